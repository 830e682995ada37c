// Asks the built site's own search: `node search_site.js SITE` reads questions from stdin, a line each, and prints for each a line of
// JSON, the pages found, best first. The theme's worker runs as it is, without a browser around it.
const fs = require("fs");
const path = require("path");
const vm = require("vm");

const site = process.argv[2];
const workers = path.join(site, "assets/javascripts/workers");
const file = fs.readdirSync(workers).find((name) => /^search\..*\.js$/.test(name));
const index = JSON.parse(fs.readFileSync(path.join(site, "search/search_index.json"), "utf8"));
let heard, answered;
const world = {
  console,
  URL,
  setTimeout,
  addEventListener: (_, listener) => (heard = listener),
  postMessage: (message) => answered(message),
};
world.self = world;
vm.createContext(world);
vm.runInContext(fs.readFileSync(path.join(workers, file), "utf8"), world);
const ask = (data) => new Promise((resolve) => ((answered = resolve), heard({ data })));

(async () => {
  await ask({ type: 0, data: { config: index.config, docs: index.docs, options: { suggest: true } } });
  for (const question of fs.readFileSync(0, "utf8").split("\n").filter(Boolean)) {
    const { data } = await ask({ type: 2, data: question });
    const found = data.items.map((sections) => sections.map(({ location, score }) => ({ location, score })));
    console.log(JSON.stringify(found.map((sections) => sections.sort((a, b) => b.score - a.score)[0].location)));
  }
})();

// Runs jobs with transformers.js: node in_node.mjs NODE_MODULES < jobs.json, answers as JSON on the last line.
// A job: {model, dtype, image, text | messages, tokens, pixels, resize}; `resize` is the path of the page's `pillow_resize.js`,
// without which transformers.js resizes in its own way, and `pixels` asks for what the tower got.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

const [modules] = process.argv.slice(2);
const entry = join(modules, '@huggingface', 'transformers', 'dist', 'transformers.node.mjs');
const { AutoModelForImageTextToText, AutoProcessor, RawImage, env } = await import(pathToFileURL(entry));
env.allowRemoteModels = false;
env.localModelPath = '/';

const loaded = {};
async function load({ model, dtype }) {
    const options = { local_files_only: true, ...(dtype ? { dtype } : {}) };
    return (loaded[`${model} ${dtype}`] ??= await Promise.all([
        AutoModelForImageTextToText.from_pretrained(model, options),
        AutoProcessor.from_pretrained(model, options),
    ]));
}

const answers = [];
for (const job of JSON.parse(readFileSync(0, 'utf-8'))) {
    const [model, processor] = await load(job);
    let image = job.image ? (await RawImage.read(job.image)).rgb() : null;
    if (job.resize) image = (await import(pathToFileURL(job.resize))).resizedFor(processor.image_processor, image);
    let inputs;
    if (job.messages) {
        const text = processor.apply_chat_template(job.messages, { add_generation_prompt: true });
        const begins = processor.tokenizer.bos_token;
        inputs = await processor(image, text, { add_special_tokens: !(begins && text.startsWith(begins)) });
    } else {
        inputs = image ? await processor(image, job.text) : processor.tokenizer(job.text);
    }
    const ids = await model.generate({ ...inputs, max_new_tokens: job.tokens, do_sample: false });
    answers.push({
        prompt: inputs.input_ids.tolist()[0].map(Number),
        ids: ids.tolist()[0].map(Number),
        text: processor.batch_decode(ids, { skip_special_tokens: true })[0],
        pixels: job.pixels ? Array.from(inputs.pixel_values.data) : undefined,
    });
}
console.log(JSON.stringify(answers));

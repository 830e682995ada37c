# ruff: noqa: F811 (fixtures are imported by name)
"""The test Hub against the real client: what it serves, refuses and loses, so that tests built on it mean something.

Clients run in fresh processes and print what they saw as JSON; the assertions stand here.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.hub_fixtures import ROOT, Hub, hub, module_hub  # noqa: F401


pytestmark = pytest.mark.hub

CARD = """---
license: mit
library_name: frozen-prefix
pipeline_tag: image-text-to-text
base_model:
- me/tower
- me/words
---
# Eyes
"""
# A folder with a card, a regular file in a folder of its own, and an LFS file of {size} bytes.
FOLDER = """
import json, os, pathlib
from huggingface_hub import HfApi, errors
api = HfApi()
folder = pathlib.Path("folder")
(folder / "sub").mkdir(parents=True)
(folder / "README.md").write_text({card!r})
(folder / "sub" / "notes.txt").write_text("regular")
(folder / "model.safetensors").write_bytes(bytes(range(256)) * ({size} // 256))
def failure(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return [type(error).__name__, status]
    return ["none", None]
def push(repo_id, **kwargs):
    api.create_repo(repo_id, exist_ok=True)
    return api.upload_folder(repo_id=repo_id, folder_path="folder", commit_message="eyes", **kwargs)
"""


def client(code: str, *, size: int = 4096) -> str:
    return FOLDER.format(card=CARD, size=size) + code


def cached(home: Path) -> dict[str, int]:
    """{path: bytes} of every file of content in a client's cache: whole ones, parts, and links to them."""
    sizes = {}
    for path in (home / "hub").rglob("*"):
        if path.is_file() and path.suffix != ".lock" and {"blobs", "snapshots"} & set(path.parts):
            sizes[str(path.relative_to(home / "hub"))] = path.stat().st_size
    return sizes


@pytest.fixture(scope="module")
def paged_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub whose listings have two entries a page, so that the client must turn them."""
    paged = Hub(tmp_path_factory.mktemp("paged"), page_size=2)
    yield paged
    paged.stop()


class TestServes:
    def test_push_and_pull(self, paged_hub: Hub) -> None:
        saw = paged_hub.run_json(
            client("""
saw = {"who": api.whoami()["name"], "url": str(api.create_repo("me/eyes"))}
saw["again"] = failure(api.create_repo, "me/eyes")
saw["pushed"] = push("me/eyes").oid
saw["unchanged"] = push("me/eyes").oid
saw["files"] = api.list_repo_files("me/eyes")
info = api.model_info("me/eyes", files_metadata=True)
saw["sha"], saw["card"], saw["library"] = info.sha, info.card_data.to_dict(), info.library_name
saw["sizes"] = {s.rfilename: [s.size, s.lfs and s.lfs.sha256] for s in info.siblings}
saw["commits"] = [c.title for c in api.list_repo_commits("me/eyes")]
saw["here"] = {p: (pathlib.Path(api.snapshot_download("me/eyes")) / p).read_bytes().hex() for p in saw["files"]}
saw["one"] = pathlib.Path(api.hf_hub_download("me/eyes", "sub/notes.txt", revision=saw["sha"])).read_text()
saw["missing"] = failure(api.hf_hub_download, "me/eyes", "pytorch_model.bin")
saw["exists"] = [api.file_exists("me/eyes", "README.md"), api.file_exists("me/eyes", "nothing")]
print(json.dumps(saw))
""")
        )
        weights = bytes(range(256)) * 16
        assert saw["who"] == "me"
        assert saw["url"] == f"{paged_hub.endpoint}/me/eyes"
        assert saw["again"] == ["HfHubHTTPError", 409]
        assert re.fullmatch("[0-9a-f]{40}", saw["pushed"])
        assert saw["unchanged"] == saw["pushed"] == saw["sha"]
        assert sorted(saw["files"]) == [".gitattributes", "README.md", "model.safetensors", "sub/notes.txt"]
        assert saw["card"]["base_model"] == ["me/tower", "me/words"] and saw["library"] == "frozen-prefix"
        assert saw["sizes"]["model.safetensors"] == [4096, hashlib.sha256(weights).hexdigest()]
        assert saw["sizes"]["sub/notes.txt"] == [7, None]
        assert saw["commits"] == ["eyes", "initial commit"]
        assert bytes.fromhex(saw["here"]["model.safetensors"]) == weights
        assert bytes.fromhex(saw["here"]["README.md"]).decode() == CARD
        assert saw["one"] == "regular"
        assert saw["missing"] == ["RemoteEntryNotFoundError", 404]
        assert saw["exists"] == [True, False]

    def test_revisions(self, module_hub: Hub) -> None:
        saw = module_hub.run_json(
            client("""
first = push("me/revisions").oid
api.create_tag("me/revisions", tag="v1")
api.create_branch("me/revisions", branch="feature/x")
saw = {"branch again": failure(api.create_branch, "me/revisions", branch="feature/x")}
saw["tag again"] = failure(api.create_tag, "me/revisions", tag="v1")
(folder / "sub" / "notes.txt").write_text("on the branch")
on_branch = push("me/revisions", revision="feature/x").oid
api.delete_file("README.md", "me/revisions", parent_commit=first)
saw["conflict"] = failure(push, "me/revisions", parent_commit=first)
def read(revision):
    return pathlib.Path(api.hf_hub_download("me/revisions", "sub/notes.txt", revision=revision)).read_text()
revisions = [None, "v1", "feature/x", on_branch]
saw["texts"] = [read(revision) for revision in revisions]
saw["short"] = api.model_info("me/revisions", revision=on_branch[:8]).sha == on_branch
saw["files"] = [sorted(api.list_repo_files("me/revisions", revision=r)) for r in ("main", "v1")]
refs = api.list_repo_refs("me/revisions", include_pull_requests=True)
saw["branches"] = {b.name: b.target_commit for b in refs.branches}
saw["tags"] = {t.name: t.target_commit for t in refs.tags}
saw["expected"] = [first, on_branch]
saw["unknown"] = [failure(read, "v9"), failure(api.model_info, "me/revisions", revision="v9")]
saw["to a tag"] = failure(push, "me/revisions", revision="v1")
api.delete_branch("me/revisions", branch="feature/x")
api.delete_tag("me/revisions", tag="v1")
saw["gone"] = [failure(read, "feature/x"), failure(api.delete_tag, "me/revisions", tag="v1")]
saw["still"] = read(on_branch)
print(json.dumps(saw))
""")
        )
        first, on_branch = saw["expected"]
        assert saw["branch again"] == saw["tag again"] == ["HfHubHTTPError", 409]
        assert saw["conflict"] == ["HfHubHTTPError", 412]
        assert saw["texts"] == ["regular", "regular", "on the branch", "on the branch"]
        assert saw["short"] is True
        assert "README.md" not in saw["files"][0] and "README.md" in saw["files"][1]
        assert saw["branches"]["feature/x"] == on_branch and saw["branches"]["main"] not in (first, on_branch)
        assert saw["tags"] == {"v1": first}
        assert saw["unknown"] == saw["gone"] == [["RevisionNotFoundError", 404]] * 2
        assert saw["to a tag"] == ["BadRequestError", 400]
        assert saw["still"] == "on the branch"

    def test_datasets_pull_requests_and_the_rest(self, module_hub: Hub) -> None:
        saw = module_hub.run_json(
            client("""
from huggingface_hub import CommitOperationAdd, CommitOperationCopy
saw = {}
api.create_repo("me/data", repo_type="dataset")
api.upload_file(path_or_fileobj=b"a,b", path_in_repo="rows.csv", repo_id="me/data", repo_type="dataset")
saw["rows"] = open(api.hf_hub_download("me/data", "rows.csv", repo_type="dataset")).read()
saw["as model"] = failure(api.model_info, "me/data")
push("me/proposed")
pull = api.create_commit("me/proposed", [CommitOperationAdd("new.txt", b"new")], commit_message="new", create_pr=True)
saw["pull"] = [pull.pr_num, api.file_exists("me/proposed", "new.txt")]
saw["on it"] = open(api.hf_hub_download("me/proposed", "new.txt", revision="refs/pr/1")).read()
api.merge_pull_request("me/proposed", 1)
saw["status"] = api.get_discussion_details("me/proposed", 1).status
saw["merged"] = sorted(api.list_repo_files("me/proposed"))
copy = CommitOperationCopy("model.safetensors", "copy.safetensors")
api.create_commit("me/proposed", [copy], commit_message="copy")
infos = api.get_paths_info("me/proposed", ["copy.safetensors", "new.txt", "none"], expand=True)
saw["infos"] = [[i.path, i.size, i.last_commit.title] for i in infos]
tree = api.list_repo_tree("me/proposed", "sub")
saw["sub"] = [entry.path for entry in tree]
saw["no folder"] = failure(lambda: list(api.list_repo_tree("me/proposed", "none")))
api.super_squash_history("me/proposed", commit_message="one")
saw["squashed"] = [c.title for c in api.list_repo_commits("me/proposed")]
(folder / ".gitignore").write_text("*.log\\n")
(folder / "run.log").write_text("noise")
(folder / "README.md").write_text("---\\nbase_model: [1]\\n---\\n")
saw["bad card"] = failure(push, "me/proposed")
(folder / "README.md").unlink()
push("me/proposed")
saw["ignored"] = api.file_exists("me/proposed", "run.log")
saw["listed"] = sorted(m.id for m in api.list_models(author="me", search="propos"))
api.delete_repo("me/proposed")
saw["deleted"] = failure(api.model_info, "me/proposed")
print(json.dumps(saw))
""")
        )
        assert saw["rows"] == "a,b"
        assert saw["as model"] == saw["deleted"] == ["RepositoryNotFoundError", 404]
        assert saw["pull"] == [1, False] and saw["on it"] == "new" and saw["status"] == "merged"
        assert {"new.txt", "README.md", "model.safetensors"} < set(saw["merged"])
        assert saw["infos"] == [["copy.safetensors", 4096, "copy"], ["new.txt", 3, "new (#1)"]]
        assert saw["sub"] == ["sub/notes.txt"] and saw["no folder"] == ["RemoteEntryNotFoundError", 404]
        assert saw["squashed"] == ["one"]
        assert saw["bad card"] == ["ValueError", None]
        assert saw["ignored"] is False
        assert saw["listed"] == ["me/proposed"]

    def test_private_gated_and_missing(self, module_hub: Hub) -> None:
        module_hub.add_user("reader", "hf_reader", orgs=("me",), role="read")  # in, but may not write
        module_hub.run(
            client("""
push("me/secret"); api.update_repo_settings("me/secret", private=True)
push("me/gated"); api.update_repo_settings("me/gated", gated="auto")
api.create_repo("me/born-private", private=True)
assert api.model_info("me/secret").private and api.hf_hub_download("me/secret", "model.safetensors")
assert api.model_info("me/gated").gated == "auto" and api.hf_hub_download("me/gated", "model.safetensors")
""")
        )
        asked = client("""
def download(repo_id):
    return failure(api.hf_hub_download, repo_id, "model.safetensors")
def info(repo_id):
    return failure(api.model_info, repo_id)
print(json.dumps({
    "secret": [download("me/secret"), info("me/secret"), info("me/born-private")],
    "missing": [download("me/none"), info("me/none"), failure(api.auth_check, "me/none")],
    "gated": [download("me/gated"), info("me/gated"), failure(api.auth_check, "me/gated")],
    "write": failure(api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="me/gated"),
    "squat": failure(api.create_repo, "me/other"),
    "who": failure(api.whoami),
}))
""")
        stranger = module_hub.run_json(asked, token="hf_you")
        assert stranger["secret"] == stranger["missing"] == [["RepositoryNotFoundError", 404]] * 3
        assert stranger["gated"] == [["GatedRepoError", 403], ["none", None], ["GatedRepoError", 403]]
        assert stranger["write"] == stranger["squat"] == ["HfHubHTTPError", 403]
        assert stranger["who"] == ["none", None]
        nobody = module_hub.run_json(asked, token=None)
        assert nobody["secret"] == nobody["missing"] == [["RepositoryNotFoundError", 401]] * 3
        assert nobody["gated"] == [["GatedRepoError", 401], ["none", None], ["GatedRepoError", 401]]
        assert nobody["write"][1] == nobody["squat"][1] == 401
        reader = module_hub.run_json(asked, token="hf_reader")
        assert reader["secret"] == reader["gated"] == [["none", None]] * 3
        assert reader["write"] == reader["squat"] == ["HfHubHTTPError", 403]
        unknown = module_hub.run_json(asked, token="hf_nobody_knows")
        assert unknown["who"] == ["HfHubHTTPError", 401] and unknown["gated"][0] == ["HfHubHTTPError", 401]

        status, _, _ = module_hub.request("POST", "/api/models/me/gated/user-access-request/grant", {"user": "you"})
        assert status == 200
        assert module_hub.run_json(asked, token="hf_you")["gated"] == [["none", None]] * 3

    def test_ranges_and_headers(self, module_hub: Hub) -> None:
        oid = module_hub.run(client('print(push("me/ranges").oid)')).split()[-1]
        path, whole = "/me/ranges/resolve/main/model.safetensors", bytes(range(256)) * 16
        for asked, first, last in (
            ("0-9", 0, 9),
            ("4000-", 4000, 4095),
            ("-6", 4090, 4095),
            ("4090-9999", 4090, 4095),
        ):
            status, headers, body = module_hub.request("GET", path, headers={"Range": f"bytes={asked}"})
            assert (status, body) == (206, whole[first : last + 1])
            assert headers["Content-Range"] == f"bytes {first}-{last}/4096"
        status, headers, _ = module_hub.request("GET", path, headers={"Range": "bytes=4096-"})
        assert (status, headers["Content-Range"]) == (416, "bytes */4096")
        status, headers, body = module_hub.request("HEAD", path)
        assert (status, body, headers["X-Repo-Commit"], headers["Content-Length"]) == (200, b"", oid, "4096")
        assert headers["X-Linked-Etag"].strip('"') == hashlib.sha256(whole).hexdigest()
        status, headers, _ = module_hub.request("HEAD", "/me/ranges/resolve/main/sub/notes.txt")
        assert headers["ETag"].strip('"') == hashlib.sha1(b"blob 7\0regular").hexdigest()
        status, headers, _ = module_hub.request("HEAD", "/me/ranges/resolve/main/none")
        assert (status, headers["X-Error-Code"], headers["X-Repo-Commit"]) == (404, "EntryNotFound", oid)
        assert module_hub.request("GET", "/api/nothing/here")[0] == 404

    def test_counts_bytes(self, hub: Hub) -> None:
        home = hub.new_home()
        hub.run(client('push("me/eyes")', size=300_000), home)
        stats = hub.stats()
        assert 300_000 < stats["lfs_upload"]["bytes_in"] < 301_500 and stats["lfs_upload"]["requests"] == 1
        assert stats["commit"]["bytes_in"] < 4000
        assert hub.bytes_in() == sum(entry["bytes_in"] for entry in hub.log())
        hub.reset_stats()
        assert hub.log() == [] and hub.stats() == {}
        hub.run(client('push("me/eyes")', size=300_000), home)  # nothing new: asked, not sent
        assert "lfs_upload" not in hub.stats() and hub.bytes_in() < 10_000
        hub.reset_stats()
        pull = 'from huggingface_hub import snapshot_download; snapshot_download("me/eyes")'
        hub.run(pull, home)
        assert 300_000 < hub.bytes_out("resolve") < 305_000
        hub.reset_stats()
        hub.run(pull, home)  # all of it is in the cache
        assert hub.bytes_out() < 10_000
        assert all(entry["status"] == 200 for entry in hub.log())

    def test_takes_only_whole_requests(self, module_hub: Hub) -> None:
        """A client that goes away in the middle, or sends other weights than it announced, changes nothing."""
        module_hub.run('from huggingface_hub import create_repo; create_repo("me/whole")')
        lines = [{"key": "header", "value": {"summary": "half"}}]
        lines += [{"key": "file", "value": {"path": f"{n}.txt", "content": "eA==", "encoding": "base64"}} for n in "ab"]
        body = "".join(json.dumps(line) + "\n" for line in lines).encode()
        half = body.rindex(b"{", 0, body.rindex(b'"value"'))  # whole lines, but not all of them
        host, port = module_hub.endpoint.removeprefix("http://").split(":")
        head = "POST /api/models/me/whole/commit/main HTTP/1.1\r\nAuthorization: Bearer hf_me\r\nHost: hub\r\n"
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:half])
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
        assert [c["title"] for c in module_hub.commits("me/whole")] == ["initial commit"]
        address = f"/lfs/models/me/whole/{hashlib.sha256(b'announced').hexdigest()}"
        assert module_hub.request("PUT", address, "other")[0] == 400
        asked = {"operation": "upload", "objects": [{"oid": address[-64:], "size": 9}]}
        _, _, answer = module_hub.request("POST", "/me/whole.git/info/lfs/objects/batch", asked)
        assert json.loads(answer)["objects"][0]["actions"]["upload"]["href"] == module_hub.endpoint + address
        pointer = {"key": "lfsFile", "value": {"path": "model.safetensors", "oid": address[-64:], "size": 9}}
        body = json.dumps(lines[0]).encode() + b"\n" + json.dumps(pointer).encode()
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")

    def test_runs_from_the_command_line(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.loopback_hub.server", "--port", "0", "--root", str(tmp_path)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+\n", process.stdout.readline())
            process.terminate()
            assert process.wait(timeout=10) == 0
        finally:
            process.kill()
            process.stdout.close()


TINY = """
import hashlib, json
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
def facts(model, tokenizer):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    inputs = tokenizer("a b c", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    print(json.dumps({"digest": digest.hexdigest(), "ids": ids.tolist()}))
"""
PUSH_TINY = (
    TINY
    + """
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "c": 3, "d": 4}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
config = GPT2Config(vocab_size=5, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None)
model = GPT2LMHeadModel(config).eval()
facts(model, tokenizer)
model.push_to_hub("me/tiny")
tokenizer.push_to_hub("me/tiny")
"""
)
PULL_TINY_TWICE = (
    TINY
    + """
import os, pathlib
try:
    AutoModelForCausalLM.from_pretrained("me/tiny")
except OSError:
    there = [path.name for path in pathlib.Path(os.environ["HF_HOME"], "hub").rglob("*") if path.is_file()]
    assert "config.json" in there and not [name for name in there if "safetensors" in name or "incomplete" in name]
else:
    raise SystemExit("a model came over a wire that was cut")
facts(AutoModelForCausalLM.from_pretrained("me/tiny"), AutoTokenizer.from_pretrained("me/tiny"))
"""
)
PULL_TINY = TINY + 'facts(AutoModelForCausalLM.from_pretrained("me/tiny"), AutoTokenizer.from_pretrained("me/tiny"))'


def test_transformers_round_trip_then_offline(hub: Hub) -> None:
    """Push; pull elsewhere, first over a wire that breaks; pull without a Hub; one that comes back has all it had."""
    pushed = hub.run_json(PUSH_TINY)
    head = hub.commits("me/tiny")[0]["id"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files("me/tiny"))

    elsewhere = hub.new_home()
    hub.cut("GET /me/tiny/resolve/.*model.safetensors", after_bytes=500, how="reset")
    assert hub.run_json(PULL_TINY_TWICE, elsewhere, token=None) == pushed
    assert [e["status"] for e in hub.log() if e["method"] == "GET" and "model.safetensors" in e["path"]] == [0, 200]

    hub.stop()
    assert hub.run_json(PULL_TINY, elsewhere, offline=True) == pushed
    with pytest.raises(OSError):
        hub.request("GET", "/api/models/me/tiny")
    fresh = hub.attempt("from huggingface_hub import hf_hub_download; hf_hub_download('me/tiny', 'config.json')")
    assert fresh.returncode != 0 and "LocalEntryNotFoundError" in fresh.stderr

    hub.start()
    assert hub.commits("me/tiny")[0]["id"] == head
    assert json.loads(hub.read("me/tiny", "config.json"))["n_layer"] == 2


# Between its tries the client waits for seconds, 23 in all, in which nothing happens.
HURRIED = "import time; time.sleep = lambda seconds: None\n"


class TestCutWire:
    """The client fails, nothing half-done shows, and the same call succeeds after."""

    PUSH = client('print(push("me/cut").oid)', size=300_000)

    @pytest.mark.parametrize("how", ["close", "reset"])
    def test_commit_lost_on_its_way(self, hub: Hub, how: str) -> None:
        hub.run('from huggingface_hub import create_repo; create_repo("me/cut")')
        before = hub.commits("me/cut")
        hub.cut("POST /api/models/me/cut/commit/", after_bytes=200, how=how)
        cut = hub.attempt(self.PUSH)
        assert cut.returncode != 0 and re.search(r"httpx2?\.(Read|Write|RemoteProtocol)Error", cut.stderr)
        assert hub.commits("me/cut") == before and set(hub.files("me/cut")) == {".gitattributes"}
        assert [entry["status"] for entry in hub.log() if entry["label"] == "commit"] == [0]
        hub.reset_stats()
        oid = hub.run(self.PUSH).strip()
        assert [c["id"] for c in hub.commits("me/cut")] == [oid, before[0]["id"]]
        assert "lfs_upload" not in hub.stats()  # what had come whole is not sent again

    def test_commit_whose_answer_is_lost(self, hub: Hub) -> None:
        """The one case in which the client fails and the commit stands: a second push must not double it."""
        hub.cut("POST /api/models/me/cut/commit/", where="silence")
        assert hub.attempt(self.PUSH).returncode != 0
        assert [c["title"] for c in hub.commits("me/cut")] == ["eyes", "initial commit"]
        oid = hub.run(self.PUSH).split()[-1]
        assert [c["id"] for c in hub.commits("me/cut")][0] == oid and len(hub.commits("me/cut")) == 2

    def test_upload_that_recovers(self, hub: Hub) -> None:
        """One cut in the middle of the weights: the client sends them again by itself, and what arrives is whole."""
        hub.cut("PUT /lfs/", after_bytes=100_000)
        hub.run(self.PUSH)
        assert [entry["status"] for entry in hub.log() if entry["label"] == "lfs_upload"] == [0, 200]
        assert hub.read("me/cut", "model.safetensors") == bytes(range(256)) * (300_000 // 256)

    def test_upload_refused(self, hub: Hub) -> None:
        hub.answer_with("PUT /lfs/", 403)
        refused = hub.attempt(self.PUSH)
        assert refused.returncode != 0 and "403" in refused.stderr
        assert set(hub.files("me/cut")) == {".gitattributes"}
        hub.run(self.PUSH)
        assert hub.files("me/cut")["model.safetensors"] == 300_000 // 256 * 256

    @pytest.mark.parametrize(("how", "times", "tries"), [("close", 6, 6), ("reset", 1, 1)])
    def test_download(self, hub: Hub, how: str, times: int, tries: int) -> None:
        """A download that breaks leaves no file that reads as a whole one, not even a part."""
        hub.run(self.PUSH)
        hub.reset_stats()
        home = hub.new_home()
        pull = 'from huggingface_hub import hf_hub_download; print(hf_hub_download("me/cut", "model.safetensors"))'
        hub.cut("GET /me/cut/resolve/.*model.safetensors", after_bytes=100_000, how=how, times=times)
        assert hub.attempt(HURRIED + pull, home).returncode != 0
        assert [e["status"] for e in hub.log() if e["method"] == "GET" and e["label"] == "resolve"] == [0] * tries
        assert cached(home) == {}
        offline = hub.attempt(pull, home, offline=True)
        assert offline.returncode != 0 and "LocalEntryNotFoundError" in offline.stderr
        path = Path(hub.run(pull, home).strip())
        assert path.read_bytes() == bytes(range(256)) * (300_000 // 256)
        assert hub.run(pull, home, offline=True).strip() == str(path)

    def test_download_taken_up_where_it_broke(self, hub: Hub) -> None:
        hub.run(client('push("me/cut")', size=12 << 20))
        hub.reset_stats()
        hub.cut("GET /me/cut/resolve/.*model.safetensors", after_bytes=11 << 20)  # past the client's 10 MiB chunk
        pull = """
        import hashlib, huggingface_hub
        path = huggingface_hub.hf_hub_download("me/cut", "model.safetensors")
        print(hashlib.sha256(open(path, "rb").read()).hexdigest())
        """
        assert hub.run(pull).strip() == hashlib.sha256(bytes(range(256)) * (12 << 12)).hexdigest()
        parts = [e for e in hub.log() if e["method"] == "GET" and e["label"] == "resolve"]
        assert [e["status"] for e in parts] == [0, 206]
        assert parts[1]["bytes_out"] < (2 << 20) + 1000

    def test_upload_that_is_abandoned(self, module_hub: Hub) -> None:
        module_hub.cut("PUT /lfs/models/me/stubborn/", after_bytes=100_000, times=None)
        done = module_hub.attempt(client(HURRIED + 'push("me/stubborn")', size=300_000))
        assert done.returncode != 0 and "Error while uploading 'model.safetensors'" in done.stderr
        puts = [e["status"] for e in module_hub.log() if e["path"].startswith("/lfs/models/me/stubborn/")]
        assert puts == [0] * 6
        assert set(module_hub.files("me/stubborn")) == {".gitattributes"}
        sha256 = hashlib.sha256(bytes(range(256)) * (300_000 // 256)).hexdigest()
        assert not (module_hub.root / "blobs" / sha256).exists()
        assert [p.name for p in module_hub.root.iterdir() if p.name not in ("blobs", "state.json")] == []
        module_hub.mend()
        module_hub.run(client('push("me/stubborn")', size=300_000))
        assert hashlib.sha256(module_hub.read("me/stubborn", "model.safetensors")).hexdigest() == sha256

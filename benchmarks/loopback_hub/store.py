"""What the loopback Hub of `server.py` holds: accounts, repositories, commits and contents, and who may see them.

Every commit is a snapshot `{path: file}` with a 40-hex id. Contents lie by their SHA-256 under `ROOT/blobs`, all else
in `ROOT/state.json`, so a server that is stopped and started again on the same folder goes on where it was.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


Repo = dict[str, Any]
Tree = dict[str, dict[str, Any]]  # path -> {"size", "oid": git's SHA-1, "sha256", "lfs": bool}

DEFAULT_TOKENS = {
    "hf_me": {"name": "me", "orgs": [], "role": "write"},
    "hf_you": {"name": "you", "orgs": [], "role": "write"},
}
# What the Hub writes into a new repository (its most used lines): it decides which files are LFS.
LFS_PATTERNS = """*.7z *.arrow *.bin *.ckpt *.gz *.h5 *.model *.msgpack *.npy *.npz *.onnx *.parquet *.pb *.pickle
*.pkl *.pt *.pth *.safetensors *.tar *.tflite *.tgz *.xz *.zip *.zst *tfevents*"""
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS.split())
LFS_FROM_BYTES = 10 * 1024 * 1024  # larger files are LFS whatever their name
REPO_NAME = re.compile(r"[\w][\w.-]{0,95}")
HEX40 = re.compile(r"[0-9a-f]{40}")
HEX64 = re.compile(r"[0-9a-f]{64}")


class HubError(Exception):
    """An answer other than success: status, sentence, and the Hub's X-Error-Code where the client looks for one."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body
        self.headers: dict[str, str] = {}


def now() -> str:
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds // 10**6:03d}Z"


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def front_matter(card: str) -> dict[str, Any]:
    """The YAML block at the head of a card; raises ValueError where it is no mapping."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", card, re.DOTALL)
    if not block:
        return {}
    try:
        data = yaml.safe_load(block.group(1))
    except yaml.YAMLError as error:
        raise ValueError(f"the YAML block does not parse: {error}") from error
    if data is not None and not isinstance(data, dict):
        raise ValueError("the YAML block must be a mapping")
    return data or {}


def card_problems(card: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) as the Hub's validate-yaml finds them, for the fields that a model's card has."""
    try:
        data = front_matter(card)
    except ValueError as error:
        return [str(error)], []
    errors: list[str] = []
    for field in ("base_model", "datasets", "language", "tags", "license"):
        values = data.get(field)
        if values is None:
            continue
        values = values if isinstance(values, list) else [values]
        if field == "tags" and not isinstance(data[field], list):
            errors.append('"tags" must be an array')
        for value in values:
            if not isinstance(value, str):
                errors.append(f'"{field}" must hold strings, not {value!r}')
            elif field == "base_model" and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
                errors.append(f'"base_model" with value {value!r} is not valid: use a model id from the Hub')
    index = data.get("model-index")
    for entry in index if isinstance(index, list) else ([] if index is None else [index]):
        if not isinstance(entry, dict) or not isinstance(entry.get("results"), list):
            errors.append('"model-index" must be an array of {name, results}')
            continue
        for result in entry["results"]:
            if not result.get("task", {}).get("type"):
                errors.append('"model-index[].results[].task.type" is required')
            if not isinstance(result.get("metrics"), list) or not all("type" in m and "value" in m for m in result["metrics"]):
                errors.append('"model-index[].results[].metrics" must be an array of {type, value}')
    return errors, [] if data else ["empty or missing yaml metadata in repo card"]


class Store:
    """Accounts, repositories and contents. One lock guards all; a change is on disk before it is answered."""

    def __init__(self, root: Path) -> None:
        self.root, self.blobs, self.state = root, root / "blobs", root / "state.json"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        state = json.loads(self.state.read_text()) if self.state.exists() else {}
        self.repos: dict[str, Repo] = state.get("repos", {})
        self.tokens: dict[str, dict[str, Any]] = state.get("tokens", dict(DEFAULT_TOKENS))

    def save(self) -> None:
        new = self.state.with_suffix(".new")
        new.write_text(json.dumps({"repos": self.repos, "tokens": self.tokens}))
        os.replace(new, self.state)

    # Contents

    def put(self, data: bytes) -> dict[str, Any]:
        sha256 = hashlib.sha256(data).hexdigest()
        if not (self.blobs / sha256).exists():
            with tempfile.NamedTemporaryFile(dir=self.root, delete=False) as file:
                file.write(data)
            os.replace(file.name, self.blobs / sha256)
        return {"size": len(data), "oid": git_oid(data), "sha256": sha256, "lfs": False}

    def put_folder(self, kind: str, repo_id: str, folder: Path) -> str:
        """Makes `folder` what lies on the main branch of a public repository ("models" or "datasets"), and returns its commit:
        the one before where nothing changed, so that what was recorded stays true."""
        tree = {".gitattributes": self.put(GITATTRIBUTES.encode())}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            tree[name] = self.put(path.read_bytes())
            tree[name]["lfs"] = self.is_lfs(tree, name, tree[name]["size"])
            if tree[name]["lfs"]:
                tree[name]["oid"] = git_oid(lfs_pointer(tree[name]["sha256"], tree[name]["size"]))
        with self.lock:
            repo = self.repos.get(f"{kind}/{repo_id}")
            if repo is None:
                repo = self.new_repo(kind, repo_id, private=False)
                self.repos[f"{kind}/{repo_id}"] = repo
            head = repo["refs"].get("refs/heads/main")
            if head is None or repo["commits"][head]["tree"] != tree:
                head = self.commit(repo, "refs/heads/main", tree, "as it lies in a folder", "", repo_id.split("/")[0])
        return head

    @staticmethod
    def new_repo(kind: str, repo_id: str, *, private: bool) -> Repo:
        """A repository without a commit."""
        return {"kind": kind, "id": repo_id, "private": private, "gated": False, "granted": [], "created": now(),
                "refs": {}, "commits": {}, "lfs": [], "discussions": []}  # fmt: skip

    def get(self, file: dict[str, Any]) -> bytes:
        return (self.blobs / file["sha256"]).read_bytes()

    # Who may do what

    @staticmethod
    def member(repo: Repo, user: dict[str, Any] | None) -> bool:
        return user is not None and repo["id"].split("/")[0] in [user["name"], *user["orgs"]]

    def find(self, kind: str, repo_id: str, user: dict[str, Any] | None, *, write: bool = False) -> Repo:
        """The repository, or the error the Hub gives: a private one does not exist for strangers."""
        repo = self.repos.get(f"{kind}/{repo_id}")
        if repo is None or (repo["private"] and not self.member(repo, user)):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise HubError(401, "Invalid username or password.")
        if write and user is not None and (user["role"] != "write" or not self.member(repo, user)):
            raise HubError(403, f"Forbidden: you don't have the rights to write to {repo_id}")
        return repo

    def open_gate(self, repo: Repo, user: dict[str, Any] | None) -> None:
        """Raises GatedRepo for those who may see that the repository exists but not what is in it."""
        if repo["gated"] and not self.member(repo, user) and (user is None or user["name"] not in repo["granted"]):
            raise HubError(
                401 if user is None else 403,
                f"Access to {repo['id']} is restricted. You must have access to it and be authenticated to access it.",
                "GatedRepo",
            )

    # Commits

    def resolve(self, repo: Repo, revision: str) -> str:
        """The commit of a branch, tag, full ref, commit id or its first seven digits and more."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in repo["refs"]:
                return repo["refs"][ref]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            matching = [commit for commit in repo["commits"] if commit.startswith(revision)]
            if len(matching) == 1:
                return matching[0]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def writable_ref(self, repo: Repo, revision: str) -> str:
        for ref in (f"refs/heads/{revision}", revision):
            if ref in repo["refs"] and not ref.startswith("refs/tags/"):
                return ref
        self.resolve(repo, revision)  # what does not exist at all is a 404
        raise HubError(400, f"Invalid rev id: {revision} is no branch to commit to")

    def commit(self, repo: Repo, ref: str, tree: Tree, title: str, message: str, author: str, *, root: bool = False) -> str:
        parent = None if root else repo["refs"].get(ref)
        record = {"parent": parent, "title": title, "message": message, "author": author, "date": now(), "tree": tree}
        oid = hashlib.sha1(json.dumps([record, len(repo["commits"])], sort_keys=True).encode()).hexdigest()
        repo["commits"][oid] = record
        repo["refs"][ref] = oid
        self.save()
        return oid

    def history(self, repo: Repo, oid: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
        while oid is not None:
            yield oid, repo["commits"][oid]
            oid = repo["commits"][oid]["parent"]

    def last_commit(self, repo: Repo, oid: str, path: str) -> dict[str, str]:
        """The commit that gave `path` the content it has at `oid`."""
        for commit, record in self.history(repo, oid):
            parent = repo["commits"][record["parent"]]["tree"] if record["parent"] else {}
            if parent.get(path) != record["tree"].get(path):
                return {"id": commit, "title": record["title"], "date": record["date"]}
        raise KeyError(path)

    # What files are

    def is_lfs(self, tree: Tree, path: str, size: int) -> bool:
        attributes = self.get(tree[".gitattributes"]).decode() if ".gitattributes" in tree else ""
        for line in attributes.splitlines():
            pattern, *words = line.split() or [""]
            if "filter=lfs" in words and (fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(Path(path).name, pattern)):
                return True
        return size >= LFS_FROM_BYTES

    @staticmethod
    def is_ignored(gitignore: str, path: str) -> bool:
        parts = path.split("/")
        for line in gitignore.splitlines():
            pattern = line.strip()
            if not pattern or pattern.startswith("#"):
                continue
            names = parts[:-1] if pattern.endswith("/") else parts  # "folder/" names folders only
            if any(fnmatch.fnmatch(name, pattern.strip("/")) for name in names) or fnmatch.fnmatch(path, pattern):
                return True
        return False

    def info(self, repo: Repo, oid: str, *, blobs: bool = False) -> dict[str, Any]:
        """The answer to model_info and dataset_info."""
        record, tree = repo["commits"][oid], repo["commits"][oid]["tree"]
        try:
            card = front_matter(self.get(tree["README.md"]).decode()) if "README.md" in tree else {}
            config = json.loads(self.get(tree["config.json"])) if "config.json" in tree else {}
        except (ValueError, UnicodeDecodeError):
            card, config = {}, {}
        library = card.get("library_name") or ("transformers" if config.get("model_type") else None)
        as_list = {k: v if isinstance(v, list) else [v] for k, v in card.items() if v is not None}
        tags = [*as_list.get("tags", []), library, card.get("pipeline_tag"), config.get("model_type")]
        tags += [f"{field}:{v}" for field in ("license", "base_model") for v in as_list.get(field, [])]
        siblings = []
        for path, file in sorted(tree.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if blobs:
                sibling |= {"size": file["size"], "blobId": file["oid"]}
                if file["lfs"]:
                    pointer = len(lfs_pointer(file["sha256"], file["size"]))
                    sibling["lfs"] = {"sha256": file["sha256"], "size": file["size"], "pointerSize": pointer}
            siblings.append(sibling)
        info = {
            "id": repo["id"], "modelId": repo["id"], "author": repo["id"].split("/")[0], "sha": oid,
            "lastModified": record["date"], "createdAt": repo["created"], "private": repo["private"],
            "gated": repo["gated"], "disabled": False, "downloads": 0, "likes": 0,
            "tags": [tag for tag in dict.fromkeys(tags) if tag], "pipeline_tag": card.get("pipeline_tag"),
            "library_name": library, "cardData": card, "siblings": siblings,
            "config": {key: config[key] for key in ("architectures", "model_type", "auto_map") if key in config},
        }  # fmt: skip
        return json.loads(json.dumps(info, default=str))  # YAML's dates

    def entries(self, repo: Repo, oid: str, under: str, *, recursive: bool, expand: bool) -> list[dict[str, Any]]:
        """The listing of a folder ("" is the whole repository), files and folders."""
        tree = repo["commits"][oid]["tree"]
        prefix = f"{under}/" if under else ""
        listed: dict[str, dict[str, Any]] = {}
        for path, file in tree.items():
            if not path.startswith(prefix):
                continue
            inner = path[len(prefix) :].split("/")
            for depth in range(1, len(inner)):
                if depth == 1 or recursive:
                    folder = prefix + "/".join(inner[:depth])
                    below = sorted((p, f["oid"]) for p, f in tree.items() if p.startswith(folder + "/"))
                    oid_of_folder = hashlib.sha1(json.dumps(below).encode()).hexdigest()
                    listed[folder] = {"type": "directory", "path": folder, "oid": oid_of_folder, "size": 0}
            if len(inner) == 1 or recursive:
                listed[path] = self.entry(repo, oid, path, file, expand=expand)
        if under and not listed:
            raise HubError(404, f"{under} does not exist on {oid[:7]}", "EntryNotFound")
        return [listed[path] for path in sorted(listed)]

    def entry(self, repo: Repo, oid: str, path: str, file: dict[str, Any], *, expand: bool) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
        if file["lfs"]:
            pointer = len(lfs_pointer(file["sha256"], file["size"]))
            entry["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": pointer}
        if expand:
            entry["lastCommit"] = self.last_commit(repo, oid, path)
        return entry

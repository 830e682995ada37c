"""A small Hub on the loopback, so that tests and commands go through the real huggingface_hub client and a real wire.

It speaks the HTTP API that huggingface_hub 2.4 uses: accounts, repositories, commits (regular and LFS files),
branches, tags, revisions, listings, downloads with ranges, private and gated repositories, pull requests.
`store.py` is what lies behind it; `wire.py` has the admin API by which tests count bytes and cut the wire.

    python -m benchmarks.loopback_hub.server --port 0 --root DIR        prints its endpoint and serves until it is ended

Clients need HF_ENDPOINT, HF_TOKEN (`hf_me` writes as "me", `hf_you` as "you") and HF_HUB_DISABLE_XET=1 before they
import huggingface_hub; `tests/helpers/hub_fixtures.py` and `benchmarks/real_parents.py` start them so.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from benchmarks.loopback_hub.store import (
    GITATTRIBUTES,
    HEX64,
    REPO_NAME,
    HubError,
    Repo,
    Tree,
    card_problems,
    git_oid,
    lfs_pointer,
    now,
)
from benchmarks.loopback_hub.wire import API, REV, WEB, HubServer, WireHandler, route


class Handler(WireHandler):
    """One method per endpoint: it returns what is answered as JSON, or sends the answer itself and returns None."""

    # Accounts and repositories

    @route("GET", r"/api/whoami-v2", "account")
    def whoami(self) -> Any:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        name = self.user["name"]
        return {
            "type": "user", "id": name, "name": name, "fullname": name, "email": f"{name}@example.org", "isPro": False,
            "orgs": [{"type": "org", "name": org, "roleInOrg": "write"} for org in self.user["orgs"]],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": self.user["role"]}},
        }  # fmt: skip

    @route("POST", r"/api/repos/create", "repository")
    def create(self) -> Any:
        asked = self.json()
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        kind, owner, name = (
            f"{asked.get('type') or 'model'}s",
            asked.get("organization") or self.user["name"],
            asked["name"],
        )
        if not REPO_NAME.fullmatch(name):
            raise HubError(400, f"Invalid repository name {name!r}")
        if self.user["role"] != "write" or owner not in [self.user["name"], *self.user["orgs"]]:
            raise HubError(403, f"You don't have the rights to create a repository under the namespace {owner}")
        repo_id = f"{owner}/{name}"
        url = f"{self.server.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        store = self.server.store
        with store.lock:
            if f"{kind}/{repo_id}" in store.repos:
                raise HubError(409, f"You already created this {kind[:-1]} repo", url=url)
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            repo = store.new_repo(kind, repo_id, private=private)
            tree = {".gitattributes": store.put(GITATTRIBUTES.encode())}
            store.commit(repo, "refs/heads/main", tree, "initial commit", "", self.user["name"])
            store.repos[f"{kind}/{repo_id}"] = repo
            store.save()
        return {"url": url, "name": repo_id}

    @route("DELETE", r"/api/repos/delete", "repository")
    def delete(self) -> Any:
        asked = self.json()
        owner = asked.get("organization") or (self.user or {}).get("name")
        with self.server.store.lock:
            repo = self.repo(f"{asked.get('type') or 'model'}s", f"{owner}/{asked['name']}", write=True)
            del self.server.store.repos[f"{repo['kind']}/{repo['id']}"]
            self.server.store.save()
        return {}

    @route("PUT", API + r"/settings", "repository")
    def settings(self, kind: str, repo_id: str) -> Any:
        asked = self.json()
        with self.server.store.lock:
            repo = self.repo(kind, repo_id, write=True)
            if "visibility" in asked or "private" in asked:
                repo["private"] = asked.get("visibility") == "private" or bool(asked.get("private"))
            repo["gated"] = asked.get("gated", repo["gated"])
            self.server.store.save()
        return {"private": repo["private"], "gated": repo["gated"]}

    @route("POST", API + r"/user-access-request/grant", "repository")
    def grant(self, kind: str, repo_id: str) -> Any:
        with self.server.store.lock:
            self.repo(kind, repo_id, write=True)["granted"].append(self.json()["user"])
            self.server.store.save()
        return {}

    @route("GET", API + r"/auth-check(?P<write>/write)?", "repository")
    def auth_check(self, kind: str, repo_id: str, write: str) -> Any:
        self.server.store.open_gate(self.repo(kind, repo_id, write=bool(write)), self.user)
        return {}

    @route("GET", r"/api/(?P<kind>models|datasets|spaces)", "info")
    def search(self, kind: str) -> Any:
        store, infos = self.server.store, []
        for repo in store.repos.values():
            seen = repo["kind"] == kind and (not repo["private"] or store.member(repo, self.user))
            author = self.query.get("author", repo["id"].split("/")[0])
            if seen and repo["id"].startswith(f"{author}/") and self.query.get("search", "") in repo["id"]:
                infos.append(store.info(repo, store.resolve(repo, "main")))
        self.page(infos)

    @route("GET", API + rf"(?:/revision/{REV})?", "info")
    def info(self, kind: str, repo_id: str, revision: str) -> Any:
        store, repo = self.server.store, self.repo(kind, repo_id)
        info = store.info(repo, store.resolve(repo, revision or "main"), blobs=self.flag("blobs"))
        wanted = parse_qs(urlsplit(self.path).query)
        fields = wanted.get("expand", []) + wanted.get("expand[]", [])
        return {key: info[key] for key in ("id", *fields) if key in info} if fields else info

    @route("POST", r"/api/validate-yaml", "yaml")
    def validate_yaml(self) -> Any:
        errors, warnings = card_problems(self.json()["content"])
        answer = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        self.reply_json(answer, 400 if errors else 200)

    # Listings

    @route("GET", API + rf"/tree/{REV}(?:/(?P<path>.+))?", "tree")
    def tree(self, kind: str, repo_id: str, revision: str, path: str) -> Any:
        store, repo = self.server.store, self.repo(kind, repo_id)
        oid = store.resolve(repo, revision)
        self.page(store.entries(repo, oid, path.strip("/"), recursive=self.flag("recursive"), expand=self.flag("expand")))

    @route("POST", API + rf"/paths-info/{REV}", "tree")
    def paths_info(self, kind: str, repo_id: str, revision: str) -> Any:
        store, repo = self.server.store, self.repo(kind, repo_id)
        oid = store.resolve(repo, revision)
        asked = parse_qs(self.body.decode())
        expand = asked.get("expand", ["false"])[-1].lower() == "true"
        entries = store.entries(repo, oid, "", recursive=True, expand=expand)
        return [entry for entry in entries if entry["path"] in asked.get("paths", [])]

    @route("GET", API + rf"/commits/{REV}", "commits")
    def commits(self, kind: str, repo_id: str, revision: str) -> Any:
        store, repo = self.server.store, self.repo(kind, repo_id)
        self.page(
            [
                {
                    "id": oid,
                    "title": c["title"],
                    "message": c["message"],
                    "date": c["date"],
                    "authors": [{"user": c["author"]}],
                }
                for oid, c in store.history(repo, store.resolve(repo, revision))
            ]
        )

    @route("GET", API + r"/refs", "refs")
    def refs(self, kind: str, repo_id: str) -> Any:
        repo = self.repo(kind, repo_id)

        def listed(prefix: str, keep: str = "") -> list[dict[str, str]]:
            matching = [(ref, oid) for ref, oid in repo["refs"].items() if ref.startswith(prefix)]
            return [{"name": keep + ref[len(prefix) :], "ref": ref, "targetCommit": oid} for ref, oid in matching]

        answer = {"branches": listed("refs/heads/"), "tags": listed("refs/tags/"), "converts": []}
        return answer | ({"pullRequests": listed("refs/pr/", "refs/pr/")} if self.flag("include_prs") else {})

    def change_ref(self, kind: str, repo_id: str, prefix: str, name: str, revision: str | None) -> Any:
        """Makes a branch or tag at `revision`, or takes it away where that is None."""
        store = self.server.store
        with store.lock:
            repo = self.repo(kind, repo_id, write=True)
            ref = prefix + name
            if revision is None:
                if ref not in repo["refs"]:
                    raise HubError(404, f"Reference {ref} does not exist", "RevisionNotFound")
                if ref == "refs/heads/main":
                    raise HubError(403, "The default branch can't be deleted")
                del repo["refs"][ref]
            else:
                if name.startswith("refs/"):
                    raise HubError(400, f"Invalid reference name {name}")
                if ref in repo["refs"]:
                    raise HubError(409, f"Reference {ref} already exists")
                repo["refs"][ref] = store.resolve(repo, revision)
            store.save()
        return {}

    @route("POST", API + r"/branch/(?P<name>[^/]+)", "refs")
    def create_branch(self, kind: str, repo_id: str, name: str) -> Any:
        return self.change_ref(kind, repo_id, "refs/heads/", name, self.json().get("startingPoint") or "main")

    @route("DELETE", API + r"/branch/(?P<name>[^/]+)", "refs")
    def delete_branch(self, kind: str, repo_id: str, name: str) -> Any:
        return self.change_ref(kind, repo_id, "refs/heads/", name, None)

    @route("POST", API + rf"/tag/{REV}", "refs")
    def create_tag(self, kind: str, repo_id: str, revision: str) -> Any:
        return self.change_ref(kind, repo_id, "refs/tags/", self.json()["tag"], revision)

    @route("DELETE", API + r"/tag/(?P<name>[^/]+)", "refs")
    def delete_tag(self, kind: str, repo_id: str, name: str) -> Any:
        return self.change_ref(kind, repo_id, "refs/tags/", name, None)

    @route("POST", API + r"/super-squash/(?P<name>[^/]+)", "refs")
    def super_squash(self, kind: str, repo_id: str, name: str) -> Any:
        store = self.server.store
        with store.lock:
            repo = self.repo(kind, repo_id, write=True)
            ref = store.writable_ref(repo, name)
            tree = repo["commits"][repo["refs"][ref]]["tree"]
            store.commit(repo, ref, tree, self.json().get("message", ""), "", self.user["name"], root=True)
        return {}

    # Uploads

    @route("POST", API + rf"/preupload/{REV}", "preupload")
    def preupload(self, kind: str, repo_id: str, revision: str) -> Any:
        store, asked = self.server.store, self.json()
        repo = self.repo(kind, repo_id, write=not self.flag("create_pr"))
        tree = repo["commits"][store.resolve(repo, revision)]["tree"]
        ignore = asked.get("gitIgnore", store.get(tree[".gitignore"]).decode() if ".gitignore" in tree else "")
        files = []
        for file in asked["files"]:
            lfs = store.is_lfs(tree, file["path"], file["size"])
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular",
                      "shouldIgnore": store.is_ignored(ignore, file["path"])}  # fmt: skip
            there = tree.get(file["path"])
            if there and there["lfs"] == lfs:
                answer["oid"] = there["sha256" if lfs else "oid"]
            files.append(answer)
        return {"files": files}

    @route("POST", WEB + r"\.git/info/lfs/objects/batch", "lfs_batch")
    def lfs_batch(self, kind: str, repo_id: str) -> Any:
        repo, asked = self.repo(kind, repo_id, write=True), self.json()
        if asked.get("operation") != "upload":
            raise HubError(400, "LFS files are downloaded by resolve")
        objects = []
        for item in asked["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if not HEX64.fullmatch(item["oid"]):
                answer["error"] = {"code": 422, "message": "the oid is no SHA-256"}
            elif item["oid"] not in repo["lfs"]:
                base = f"{self.server.endpoint}/lfs/{kind}/{repo_id}/{item['oid']}"
                answer["actions"] = {"upload": {"href": base}, "verify": {"href": f"{base}/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    @route("PUT", r"/lfs/(?P<kind>\w+)/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})", "lfs_upload")
    def lfs_upload(self, kind: str, repo_id: str, oid: str) -> Any:
        """The content itself; as with the Hub's signed addresses no token comes along. A part of it is never kept."""
        store, digest = self.server.store, hashlib.sha256()
        fd, name = tempfile.mkstemp(dir=store.root)
        try:
            with os.fdopen(fd, "wb") as file:
                for chunk in self.body_chunks():
                    digest.update(chunk)
                    file.write(chunk)
            if self.fault and self.fault["status"]:
                raise HubError(self.fault["status"], "a fault that was asked for")
            if digest.hexdigest() != oid:
                raise HubError(400, f"the content's SHA-256 is {digest.hexdigest()}, not {oid}")
            with store.lock:
                repo = store.repos.get(f"{kind}/{repo_id}")
                if repo is None:
                    raise HubError(404, "Repository not found", "RepoNotFound")
                os.replace(name, store.blobs / oid)
                if oid not in repo["lfs"]:
                    repo["lfs"].append(oid)
                    store.save()
        finally:
            Path(name).unlink(missing_ok=True)
        self.reply(200, headers={"ETag": f'"{oid}"'})

    @route("POST", r"/lfs/(?P<kind>\w+)/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify")
    def lfs_verify(self, kind: str, repo_id: str, oid: str) -> Any:
        repo = self.repo(kind, repo_id, write=True)
        blob = self.server.store.blobs / oid
        if oid not in repo["lfs"] or blob.stat().st_size != self.json()["size"]:
            raise HubError(404, f"LFS object {oid} was not uploaded whole")
        return {}

    @route("POST", API + rf"/commit/{REV}", "commit")
    def commit(self, kind: str, repo_id: str, revision: str) -> Any:
        store = self.server.store
        try:
            lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        except ValueError as error:
            raise HubError(400, f"a line of the commit is no JSON: {error}") from error
        header = next((line["value"] for line in lines if line["key"] == "header"), None)
        if header is None or not header.get("summary"):
            raise HubError(400, "a commit needs a header with a summary")
        with store.lock:
            propose = self.flag("create_pr")
            repo = self.repo(kind, repo_id, write=not propose)
            if self.user is None:
                raise HubError(401, "Invalid username or password.")
            head = store.resolve(repo, revision)
            ref = None if propose else store.writable_ref(repo, revision)
            if not head.startswith(header.get("parentCommit") or ""):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(repo["commits"][head]["tree"])
            for line in lines:
                self.apply(repo, tree, line["key"], line["value"])
            author = self.user["name"]
            message = header.get("description") or ""
            if propose:
                pull = self.open_discussion(repo, header["summary"], author, base=head)
                ref = f"refs/pr/{pull['num']}"
            oid = store.commit(repo, ref, tree, header["summary"], message, author)
        url = f"{self.server.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}", "hookOutput": ""}
        return answer | ({"pullRequestUrl": f"{url}/discussions/{pull['num']}"} if propose else {})

    def apply(self, repo: Repo, tree: Tree, key: str, value: dict[str, Any]) -> None:
        """One line of a commit, on a tree that nobody sees before the whole commit stands."""
        store, path = self.server.store, value.get("path", "")
        if key == "header":
            return
        if not path or path.startswith("/") or ".." in path.split("/"):
            raise HubError(400, f"Invalid path {path!r}")
        if key == "file":
            try:
                data = base64.b64decode(value["content"], validate=True) if value.get("encoding") == "base64" else None
            except binascii.Error as error:
                raise HubError(400, f"{path}: {error}") from error
            tree[path] = store.put(value["content"].encode() if data is None else data)
        elif key == "lfsFile":
            oid = value["oid"]
            there = oid in repo["lfs"] and (store.blobs / oid).stat().st_size
            if there is False or value.get("size", there) != there:
                raise HubError(400, f"LFS pointer of {path} points to {oid}, which was not uploaded to this repository")
            pointer = git_oid(lfs_pointer(oid, there))
            tree[path] = {"size": there, "oid": pointer, "sha256": oid, "lfs": True}
        elif key in ("deletedFile", "deletedFolder"):
            gone = [p for p in tree if p == path or (key == "deletedFolder" and p.startswith(path.rstrip("/") + "/"))]
            if not gone:
                raise HubError(400, f"{path} does not exist and can't be deleted")
            for entry in gone:
                del tree[entry]
        else:
            raise HubError(400, f"this Hub knows no commit line {key!r}")

    # Downloads

    @route("GET", WEB + rf"/resolve/{REV}/(?P<path>.+)", "resolve")
    def download(self, kind: str, repo_id: str, revision: str, path: str) -> Any:
        store, repo = self.server.store, self.repo(kind, repo_id)
        store.open_gate(repo, self.user)
        oid = store.resolve(repo, revision)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        file = repo["commits"][oid]["tree"].get(path)
        if file is None:
            error = HubError(404, f"Entry not found: {path}", "EntryNotFound")
            error.headers = headers
            raise error
        headers |= {
            "ETag": f'"{file["sha256" if file["lfs"] else "oid"]}"',
            "Content-Type": "application/octet-stream",
        }
        if file["lfs"]:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file["size"])}
        data, size = store.get(file), file["size"]
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted or not any(wanted.groups()):
            self.reply(200, data, headers)
            return
        first, last = wanted.groups()
        start = int(first) if first else max(size - int(last), 0)
        end = min(int(last), size - 1) if first and last else size - 1
        if start > end:
            self.reply(416, b"", headers | {"Content-Range": f"bytes */{size}"})
        else:
            self.reply(206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{size}"})

    # Pull requests

    def open_discussion(self, repo: Repo, title: str, author: str, *, base: str | None) -> dict[str, Any]:
        """Notes a discussion down; a pull request where `base` names the commit it starts from."""
        num = len(repo["discussions"]) + 1
        discussion = {"num": num, "title": title, "author": {"name": author}, "createdAt": now(), "events": [],
                 "repo": {"name": repo["id"], "type": repo["kind"][:-1]}, "isPullRequest": base is not None,
                 "status": "open" if base is None else "draft", "filesWithConflicts": [],
                 "changes": {"base": "refs/heads/main"}, "from": base, "diff": ""}  # fmt: skip
        repo["discussions"].append(discussion)
        if base is not None:
            repo["refs"][f"refs/pr/{num}"] = base
        return discussion

    @route("POST", API + r"/discussions", "discussions")
    def start_discussion(self, kind: str, repo_id: str) -> Any:
        asked, store = self.json(), self.server.store
        with store.lock:
            repo = self.repo(kind, repo_id)
            if self.user is None:
                raise HubError(401, "Invalid username or password.")
            base = store.resolve(repo, "main") if asked.get("pullRequest") else None
            discussion = self.open_discussion(repo, asked["title"], self.user["name"], base=base)
            store.save()
        return {"num": discussion["num"], "pullRequest": base is not None}

    @route("GET", API + r"/discussions(?:/(?P<num>\d+))?", "discussions")
    def discussions(self, kind: str, repo_id: str, num: str) -> Any:
        opened = self.repo(kind, repo_id)["discussions"]
        if not num:
            return {"discussions": opened, "count": len(opened), "start": 0}
        if not 0 < int(num) <= len(opened):
            raise HubError(404, f"there is no discussion {num}")
        return opened[int(num) - 1]

    @route("POST", API + r"/discussions/(?P<num>\d+)/(?P<what>merge|status)", "discussions")
    def change_discussion(self, kind: str, repo_id: str, num: str, what: str) -> Any:
        store = self.server.store
        with store.lock:
            repo = self.repo(kind, repo_id, write=True)
            discussion = self.discussions(kind, repo_id, num)
            event = {
                "id": f"{num}-{len(discussion['events'])}",
                "type": "status-change",
                "createdAt": now(),
                "author": self.user,
            }
            if what == "status":
                discussion["status"] = self.json()["status"]
            else:
                base, theirs = (repo["commits"][oid]["tree"] for oid in (discussion["from"], repo["refs"][f"refs/pr/{num}"]))
                tree = dict(repo["commits"][repo["refs"]["refs/heads/main"]]["tree"])
                for path in {*base, *theirs}:
                    if base.get(path) != theirs.get(path):
                        tree.pop(path, None)
                        tree |= {path: theirs[path]} if path in theirs else {}
                title = f"{discussion['title']} (#{num})"
                merged = store.commit(repo, "refs/heads/main", tree, title, "", self.user["name"])
                discussion["status"], discussion["changes"]["mergeCommitId"] = "merged", merged
            event["data"] = {"status": discussion["status"]}
            discussion["events"].append(event)
            store.save()
        return {"newStatus": event}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--root", type=Path, help="folder of contents and state; a temporary one if left out")
    parser.add_argument("--page-size", type=int, default=1000, help="entries per page of a listing")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input ends, as when its parent dies")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as spare:
        server = HubServer((args.host, args.port), Handler, args.root or Path(spare), args.page_size)
        # shutdown() waits for serve_forever, which this very thread runs.
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown, daemon=True).start())
        if args.until_eof:
            threading.Thread(target=lambda: (sys.stdin.buffer.read(), server.shutdown()), daemon=True).start()
        print(server.endpoint, flush=True)
        try:
            server.serve_forever(poll_interval=0.05)
        except KeyboardInterrupt:
            pass
        server.server_close()


if __name__ == "__main__":
    main()

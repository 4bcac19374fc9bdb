"""The half of the hub in hub_server.py that takes: new repositories, large files, commits.

As the hub does, it is asked which files are large, takes those at an address of the other origin, and puts a commit
together from them and from the small files inside the request. A commit that names a large file which did not come is
refused. What huggingface_hub would send through Xet, its other way for large files, is not understood here: clients
set HF_HUB_DISABLE_XET.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Collection
from pathlib import Path

from hub_faults import Reply, Request, json_reply, refusal, text_reply
from hub_repos import Repo

LARGE = (".safetensors", ".onnx")
REPO = r"(?P<repo>[^/]+/[^/]+)"
API = {
    "create": re.compile(r"/api/repos/create"),
    "validate-yaml": re.compile(r"/api/validate-yaml"),
    "preupload": re.compile(rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)"),
    "commit": re.compile(rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)"),
    "lfs": re.compile(rf"/{REPO}\.git/info/lfs/objects/batch"),
}
CDN = {"upload": re.compile(r"/upload/(?P<path>[0-9a-f]{64})")}
KINDS = {*API, *CDN}


class Uploads:
    """Models that clients make, each in a folder of its own below `root`.

    Attributes:
        visibility: what was asked for when it was made, by repository.
        commits: names of the files of each commit, in order.
    """

    def __init__(self, root: Path | None, writers: Collection[str]) -> None:
        self.root, self.writers = root, writers
        self.visibility: dict[str, str | None] = {}
        self.commits: list[list[str]] = []
        self._large: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def reply(self, repos: dict[tuple[str, str], Repo], ask: Request, body: bytes, urls: tuple[str, str]) -> Reply:
        """The answer to a request of one of KINDS; `urls` are those of the hub and of its other origin."""
        with self._lock:
            if ask.kind == "upload":  # the address is all it takes, as it is a signed one
                if hashlib.sha256(body).hexdigest() != ask.path:
                    return text_reply(400, "BadDigest")
                self._large[ask.path] = body
                return text_reply(200, "")
            if self.root is None or ask.token not in self.writers:
                return refusal(403 if ask.token else 401, "", "You have no right to write here.")
            if ask.kind == "validate-yaml":
                return json_reply({"errors": [], "warnings": []}, {})
            if ask.kind == "create":
                return self._create(repos, json.loads(body), urls[0])
            if ("models", ask.repo) not in repos:
                return refusal(404, "RepoNotFound", "Repository not found")
            if ask.kind == "preupload":
                paths = [file["path"] for file in json.loads(body)["files"]]
                modes = [
                    {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
                    for path in paths
                ]
                return json_reply({"files": modes}, {})
            if ask.kind == "lfs":
                objects = [
                    {**one, "actions": {"upload": {"href": f"{urls[1]}/upload/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ]
                return json_reply({"transfer": "basic", "objects": objects}, {})
            return self._commit(repos["models", ask.repo], ask, body, urls[0])

    def _create(self, repos: dict[tuple[str, str], Repo], wanted: dict, url: str) -> Reply:
        name = f"{wanted['organization']}/{wanted['name']}"
        if ("models", name) in repos:
            return text_reply(409, json.dumps({"error": "You already created this model repo", "url": f"{url}/{name}"}))
        folder = self.root / name.replace("/", "--")
        folder.mkdir(parents=True)
        repos["models", name] = Repo(folder)
        self.visibility[name] = wanted.get("visibility")
        return json_reply({"url": f"{url}/{name}", "name": name}, {})

    def _commit(self, repo: Repo, ask: Request, body: bytes, url: str) -> Reply:
        lines = [json.loads(line) for line in body.splitlines()]
        contents = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                contents[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] not in self._large:
                return refusal(400, "", f"{value['path']} was never uploaded")
            elif line["key"] == "lfsFile":
                contents[value["path"]] = self._large[value["oid"]]
        for path, content in contents.items():
            target = repo.folder / path
            if target.is_file() and target.read_bytes() == content:
                continue  # as in git: the file stays the one that an earlier revision lists
            target.parent.mkdir(parents=True, exist_ok=True)
            new = repo.folder.parent / "incoming"
            new.write_bytes(content)
            new.replace(target)
        self.commits.append(list(contents))
        sha = repo.main()
        return json_reply({"success": True, "commitUrl": f"{url}/{ask.repo}/commit/{sha}", "commitOid": sha}, {})

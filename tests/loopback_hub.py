"""A small Hub on 127.0.0.1 for the real `huggingface_hub` client: repositories, commits, LFS, pull requests.

It answers the routes that client and `hf` command line use on a model repository; what they are is read from
https://github.com/huggingface/huggingface_hub/blob/main/src/huggingface_hub/hf_api.py and `_commit_api.py` there.
A revision never changes: a commit is made of whole files or not at all, and a branch moves only to a whole commit.
Reading a private repository and any writing ask for `TOKEN`. Xet is not spoken: clients set `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_loopback"
USER = "someone"
DATE = "2026-01-01T00:00:00.000Z"
NO_REPO, NO_REVISION, NO_ENTRY = "RepoNotFound", "RevisionNotFound", "EntryNotFound"


class Refused(Exception):
    """An answer that is not 200: a status, a sentence, and the Hub's code for the client to raise by."""

    def __init__(self, status: int, message: str, code: str = "", **fields: str):
        super().__init__(message)
        self.status, self.code, self.fields = status, code, fields


class CutOff(Exception):
    """The line went dead."""


@dataclass
class Repo:
    """Commits by their hash, each a whole tree of files, and the names that point at them."""

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    log: dict[str, dict] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], title: str, parent: str | None = None) -> str:
        """Add a commit and return its hash; no name points at it yet."""
        listing = [(path, hashlib.sha256(content).hexdigest()) for path, content in sorted(files.items())]
        sha = hashlib.sha1(json.dumps([parent, title, len(self.commits), listing]).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.log[sha] = {"id": sha, "title": title, "parent": parent}
        return sha

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag, a `refs/...` name or a hash means."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.refs[name]
        if revision in self.commits:
            return revision
        raise Refused(404, f"Revision {revision} not found", NO_REVISION)


class LoopbackHub:
    """The server and what it holds; a context manager.

    `cut_after` bytes of uploaded content the line goes dead, and stays so until `mend()`.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256; only whole ones
        self.requests: list[tuple[str, str]] = []
        self.received = 0
        self.cut_after: int | None = None
        self.is_cut = threading.Event()
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def mend(self) -> None:
        """Bring the line back."""
        self.cut_after, self.received = None, 0
        self.is_cut.clear()

    def environment(self, home: Path, **extra: str) -> dict[str, str]:
        """The environment of a child process that sees this Hub, has its own cache and none of our packages."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        ours |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**kept, **ours, **extra}

    def take(self, number: int) -> None:
        """Count received bytes of content.

        Raises:
            CutOff: If the line is dead, or goes dead with these bytes.
        """
        with self.lock:
            self.received += number
            if self.cut_after is not None and self.received >= self.cut_after:
                self.is_cut.set()
        if self.is_cut.is_set():
            raise CutOff


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".pt", ".png"))


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
    if _is_lfs(path):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if _is_lfs(path) else _git_hash(content)


# The routes, in the order of an upload. Each takes the hub, the call and what its pattern caught, and returns JSON.


def _who_am_i(hub, call):
    call.check_token()
    return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}


def _create(hub, call):
    call.check_token()
    asked = json.loads(call.body())
    name = f"{asked.get('organization') or USER}/{asked['name']}"
    if name in hub.repos:
        raise Refused(409, f"You already created this model repo: {name}", url=f"{hub.url}/{name}")
    private = asked.get("private") or asked.get("visibility") == "private"
    repo = hub.repos[name] = Repo(private=bool(private))
    repo.refs["refs/heads/main"] = repo.commit({}, "initial commit")
    return {"url": f"{hub.url}/{name}", "id": name, "name": name}


def _validate(hub, call):
    text = json.loads(call.body())["content"]
    found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        fields = yaml.safe_load(found[1]) if found else {}
        errors = [] if isinstance(fields, dict) else ["the metadata is not a mapping"]
    except yaml.YAMLError as error:
        errors = [str(error)]
    return {"errors": [{"message": error} for error in errors], "warnings": []}


def _preupload(hub, call, name, revision):
    repo = call.repo(name, write=True)
    files = repo.commits[repo.resolve(revision)]
    modes = []
    for file in json.loads(call.body())["files"]:
        path = file["path"]
        oid = _etag(path, files[path]) if path in files else None
        mode = "lfs" if _is_lfs(path) else "regular"
        modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": modes}


def _lfs_batch(hub, call, name):
    call.repo(name, write=True)
    objects = []
    for wanted in json.loads(call.body())["objects"]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in hub.objects:
            hrefs = {"upload": f"{hub.url}/lfs/{wanted['oid']}", "verify": f"{hub.url}/{name}.git/info/lfs/verify"}
            entry["actions"] = {action: {"href": href} for action, href in hrefs.items()}
        objects.append(entry)
    return {"transfer": "basic", "objects": objects}


def _lfs_put(hub, call, oid):
    content = call.body(counted=True)
    if hashlib.sha256(content).hexdigest() != oid:
        raise Refused(400, "The content is not that of its hash")
    hub.objects[oid] = content
    return {}


def _lfs_verify(hub, call, name):
    asked = json.loads(call.body())
    if len(hub.objects.get(asked["oid"], b"")) != asked["size"]:
        raise Refused(404, "The object is not whole")
    return {}


def _commit(hub, call, name, revision):
    repo = call.repo(name, write=True)
    lines = [json.loads(line) for line in call.body(counted=True).splitlines()]
    with hub.lock:
        parent = repo.resolve(revision)
        header = lines[0]["value"]
        if header.get("parentCommit", parent) != parent:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[parent])
        for line in lines[1:]:
            _apply(hub, files, line["key"], line["value"])
        sha = repo.commit(files, header["summary"], parent)
        answer = {"commitOid": sha, "commitUrl": f"{hub.url}/{name}/commit/{sha}", "success": True}
        if "create_pr" in call.query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            repo.refs[f"refs/pr/{number}"] = sha
            return answer | {"pullRequestUrl": f"{hub.url}/{name}/discussions/{number}"}
        ref = revision if revision in repo.refs else f"refs/heads/{revision}"
        if ref not in repo.refs:
            raise Refused(400, f"{revision} is not a branch")
        repo.refs[ref] = sha
    return answer


def _apply(hub, files: dict[str, bytes], key: str, value: dict) -> None:
    """Put one line of a commit into the tree."""
    path = value["path"]
    if key == "file":
        files[path] = base64.b64decode(value["content"])
    elif key == "lfsFile":
        if value["oid"] not in hub.objects:
            raise Refused(400, f"{path}: its content was never uploaded")
        files[path] = hub.objects[value["oid"]]
    elif key == "deletedFile":
        if path not in files:
            raise Refused(404, "A file with this name doesn't exist", NO_ENTRY)
        del files[path]
    else:
        raise Refused(400, f"{key} is not known here")


def _discuss(hub, call, name):
    repo = call.repo(name, write=True)
    number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
    repo.refs[f"refs/pr/{number}"] = repo.resolve("main")
    return {"num": number}


def _discussion(hub, call, name, number):
    call.repo(name).resolve(f"refs/pr/{number}")
    answer = {"title": "Pull request", "num": int(number), "author": {"name": USER}, "createdAt": DATE}
    answer |= {"status": "draft", "repo": {"name": name, "type": "model"}, "isPullRequest": True, "events": []}
    return answer | {"filesWithConflicts": [], "changes": {"base": "refs/heads/main"}}


def _branch(hub, call, name, branch):
    return _point(call, name, f"refs/heads/{branch}", json.loads(call.body() or "{}").get("startingPoint", "main"))


def _tag(hub, call, name, revision):
    return _point(call, name, f"refs/tags/{json.loads(call.body())['tag']}", revision)


def _point(call, name, ref, revision):
    repo = call.repo(name, write=True)
    if ref in repo.refs:
        raise Refused(409, f"Reference already exists: {ref}")
    repo.refs[ref] = repo.resolve(revision)
    return {}


def _refs(hub, call, name):
    listed = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    for ref, sha in call.repo(name).refs.items():
        kind, _, short = ref.removeprefix("refs/").partition("/")
        group = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[kind]
        listed[group].append({"name": short, "ref": ref, "targetCommit": sha})
    return listed


def _commits(hub, call, name, revision):
    repo, sha, listed = call.repo(name), call.repo(name).resolve(revision), []
    while sha is not None:
        entry = repo.log[sha]
        listed.append({**entry, "message": "", "date": DATE, "authors": [{"user": USER}]})
        sha = entry["parent"]
    return listed


def _info(hub, call, name, revision="main"):
    repo = call.repo(name)
    sha = repo.resolve(revision)
    siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
    answer = {"_id": name, "id": name, "modelId": name, "author": name.split("/")[0], "sha": sha, "tags": []}
    return answer | {"private": repo.private, "lastModified": DATE, "siblings": siblings, "downloads": 0, "likes": 0}


def _tree(hub, call, name, revision, folder=""):
    repo = call.repo(name)
    files = repo.commits[repo.resolve(revision)]
    found = [_entry(path, content) for path, content in sorted(files.items()) if path.startswith(folder)]
    if folder and not found:
        raise Refused(404, f"{folder} does not exist", NO_ENTRY)
    return found


def _paths(hub, call, name, revision):
    repo = call.repo(name)
    asked = parse_qs(call.body().decode()).get("paths", [])
    files = repo.commits[repo.resolve(revision)]
    return [_entry(path, files[path]) for path in asked if path in files]


def _resolve(hub, call, name, revision, path):
    repo = call.repo(name)
    sha = repo.resolve(revision)
    if path not in repo.commits[sha]:
        raise Refused(404, f"{path} does not exist", NO_ENTRY)
    content = repo.commits[sha][path]
    call.send_file(content, {"X-Repo-Commit": sha, "ETag": f'"{_etag(path, content)}"'})


REPO, REVISION = r"([^/]+/[^/]+?)", r"([^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", _who_am_i),
    ("POST", r"/api/repos/create", _create),
    ("POST", r"/api/validate-yaml", _validate),
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", _preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _lfs_put),
    ("POST", rf"/{REPO}\.git/info/lfs/verify", _lfs_verify),
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}", _commit),
    ("POST", rf"/api/models/{REPO}/discussions", _discuss),
    ("GET", rf"/api/models/{REPO}/discussions/(\d+)", _discussion),
    ("POST", rf"/api/models/{REPO}/branch/{REVISION}", _branch),
    ("POST", rf"/api/models/{REPO}/tag/{REVISION}", _tag),
    ("GET", rf"/api/models/{REPO}/refs", _refs),
    ("GET", rf"/api/models/{REPO}/commits/{REVISION}", _commits),
    ("GET", rf"/api/models/{REPO}/revision/{REVISION}", _info),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}", _tree),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}/(.+)", _tree),
    ("POST", rf"/api/models/{REPO}/paths-info/{REVISION}", _paths),
    ("GET", rf"/api/models/{REPO}", _info),
    ("GET", rf"/{REPO}/resolve/{REVISION}/(.+)", _resolve),
]


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Call(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            """Find the route, run it, send what it gives; a cut line sends nothing."""
            url = urlsplit(self.path)
            self.query = parse_qs(url.query, keep_blank_values=True)
            method = "GET" if self.command == "HEAD" else self.command
            hub.requests.append((self.command, url.path))
            try:
                hub.take(0)
                for wanted, pattern, route in ROUTES:
                    if method == wanted and (found := re.fullmatch(pattern, url.path)):
                        answer = route(hub, self, *map(unquote, found.groups()))
                        if answer is not None:
                            self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
                        return
                raise Refused(404, f"No route for {method} {url.path}")
            except Refused as error:
                self.close_connection = True  # its body may not have been read
                headers = {"X-Error-Code": error.code, "X-Error-Message": str(error), "Connection": "close"}
                self.send(error.status, json.dumps({"error": str(error), **error.fields}).encode(), headers)
            except CutOff:
                self.close_connection = True

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

        def body(self, counted: bool = False) -> bytes:
            """Read the body, chunked or not."""
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.read(int(self.headers.get("Content-Length", 0)), counted)
            content = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.read(size, counted)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def read(self, size: int, counted: bool) -> bytes:
            content = bytearray()
            while len(content) < size:
                piece = self.rfile.read1(min(1 << 14, size - len(content)))
                if not piece:
                    raise CutOff  # the client has gone
                content += piece
                hub.take(len(piece) if counted else 0)
            return bytes(content)

        def repo(self, name: str, write: bool = False) -> Repo:
            """A repository that the caller may see, or change."""
            found = hub.repos.get(name)
            if write or (found is not None and found.private):
                self.check_token()
            if found is None:
                raise Refused(404, "Repository not found", NO_REPO)
            return found

        def check_token(self) -> None:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refused(401, "Invalid username or password.", NO_REPO)

        def send_file(self, content: bytes, headers: dict[str, str]) -> None:
            start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if start is None:
                return self.send(200, content, headers)
            first, size = int(start[1]), len(content)
            return self.send(206, content[first:], {**headers, "Content-Range": f"bytes {first}-{size - 1}/{size}"})

        def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_) -> None:
            """Stay silent."""

    return Call

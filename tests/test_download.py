"""scripts/download.py against a server that speaks the hub's protocol: `pytest tests/test_download.py`, about 1 min"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from conftest import ROOT, make_tiny
from helpers.shell import python
from safetensors.torch import load_file, save_file

from lit_gpt import Config, InputError
from lit_gpt.checkpoint.load import load_model
from lit_gpt.download import read_token

CHUNK = 10 * 2**20  # what the library writes at once
COMMIT = "0123456789abcdef0123456789abcdef01234567"
STEP = "89abcdef0123456789abcdef0123456789abcdef"  # of another revision, step1


class Hub(BaseHTTPRequestHandler):
    """One repository, org/tiny, from a folder; large files are redirected elsewhere, as the hub does.

    The revision step1 has other weights, of the same size.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub, path = self.server, urlsplit(self.path).path
        hub.requests[f"{self.command} {path}"] += 1
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuse:
            status, code, words = (*hub.refuse, None)[:3]
            said = {"X-Error-Code": code, "X-Error-Message": words}
            return self.send(status, b'{"error": "no"}', {name: value for name, value in said.items() if value})
        if path.startswith("/api/models/org/tiny"):
            revision = path.partition("/revision/")[2] or "main"
            if revision not in ("main", "step1", COMMIT):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            step = revision == "step1"
            siblings = [
                {
                    "rfilename": str(file.relative_to(hub.folder)),
                    "size": hub.sizes.get(file.name, file.stat().st_size),
                    "blobId": blob_id(file),
                }
                | ({"size": None, "blobId": None} if hub.tells_little else {})
                | (
                    {"lfs": {"sha256": digest(file, step), "size": file.stat().st_size, "pointerSize": 1}}
                    if is_lfs(file) and not hub.tells_little
                    else {}
                )
                for file in sorted(path for path in hub.folder.rglob("*") if path.is_file())
            ]
            found = {"id": "org/tiny", "modelId": "org/tiny", "sha": STEP if step else COMMIT, "siblings": siblings}
            return self.send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})
        if path.startswith("/org/tiny/resolve/"):
            file = hub.folder / path.split("/", 5)[5]
            commit = path.split("/")[4]
            if not file.is_file() or commit not in (COMMIT, STEP):
                return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(file)}"'}
            if is_lfs(file):
                cdn = "cdn" if commit == COMMIT else "step1/cdn"
                headers |= {"X-Linked-Etag": f'"{digest(file)}"', "X-Linked-Size": str(file.stat().st_size)}
                return self.send(
                    302, b"", headers | {"Location": f"http://localhost:{hub.server_port}/{cdn}/{file.name}"}
                )
            return self.send(200, file.read_bytes(), headers, body)
        if "/cdn/" in path:
            content = content_of(hub.folder / path.rsplit("/", 1)[1], path.startswith("/step1"))
            content = content[:-1] + b"!" if hub.swapped else content
            start, headers = 0, {"Accept-Ranges": "bytes"}
            if wanted := self.headers.get("Range"):
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                hub.ranges.append(start)
            return self.send(206 if wanted else 200, content[start:], headers, body)
        return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send(self, status: int, content: bytes, headers: dict, body: bool = True) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command == "GET":
            broken = self.server.broken if status == 200 and len(content) > CHUNK else None
            self.wfile.write(content if broken is None else content[: CHUNK + 1000])
            if broken == "stalled":
                time.sleep(100)
            self.close_connection = broken is not None


def content_of(file: Path, step: bool) -> bytes:
    content = file.read_bytes()
    return content[:-2] + b"\x00\x00" if step else content


def digest(file: Path, step: bool = False) -> str:
    return hashlib.sha256(content_of(file, step)).hexdigest()


def blob_id(file: Path) -> str:
    return subprocess.check_output(["git", "hash-object", "--no-filters", file], text=True).strip()


def is_lfs(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin")


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory, sample_dir: Path) -> Path:
    """A tiny model with the whole vocabulary, whose 19 MB are more than CHUNK."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint", sample_dir, vocab_size=49152)


@pytest.fixture
def hub(tiny_dir, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for file in tiny_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for other in ("tf_model.h5", "pytorch_model.bin", "consolidated.safetensors", "model.gguf", "README.md"):
        (folder / other).write_bytes(b"not wanted")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.refuse, server.broken, server.ranges = folder, None, None, []
    server.tells_little = False
    server.requests, server.tokens, server.swapped, server.sizes = Counter(), set(), False, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def command_of(hub, cwd: Path, *flags: str) -> dict:
    command = [sys.executable, ROOT / "scripts/download.py", "--repo_id", "org/tiny", *flags]
    here = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    here |= {"HF_HOME": str(cwd / "home"), "HF_HUB_DOWNLOAD_TIMEOUT": "5", "no_proxy": "*"}
    return dict(args=command, cwd=cwd, env=os.environ | here)


def fetch(hub, cwd: Path, *flags: str) -> subprocess.CompletedProcess:
    job = command_of(hub, cwd, *flags)
    return python(*job["args"][1:], cwd=job["cwd"], env=job["env"])


def line_of(result: subprocess.CompletedProcess) -> str:
    """The one line of an error, below progress bars."""
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_only_what_is_needed_and_only_once(hub, tiny_dir, tmp_path) -> None:
    assert fetch(hub, tmp_path, "--access_token", "hf_mine").returncode == 0
    folder = tmp_path / "checkpoints/org/tiny"
    names = {file.name for file in folder.rglob("*")}
    assert names == {file.name for file in tiny_dir.iterdir()} and "Bearer hf_mine" in hub.tokens
    assert all((folder / name).read_bytes() == (tiny_dir / name).read_bytes() for name in names)
    before = hub.requests["GET /cdn/model.safetensors"]
    assert fetch(hub, tmp_path).returncode == 0 and hub.requests["GET /cdn/model.safetensors"] == before == 1
    assert load_model(folder).config.n_layer == 2


def test_what_else_a_repository_holds(hub, tiny_dir, tmp_path) -> None:
    """Other models in subfolders, and copies in other dtypes, are left; further chat templates are not."""
    for other in ("tokenizer/tokenizer.json", "models/other.safetensors", "model.fp16.safetensors"):
        (hub.folder / other).parent.mkdir(exist_ok=True)
        (hub.folder / other).write_bytes(b"not wanted")
    template = "additional_chat_templates/rag.jinja"
    (hub.folder / template).parent.mkdir()
    (hub.folder / template).write_text("{{ messages }}")
    assert fetch(hub, tmp_path).returncode == 0
    folder = tmp_path / "checkpoints/org/tiny"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {path.name for path in tiny_dir.iterdir()} | {template}
    assert (folder / template).read_text() == "{{ messages }}"


def in_parts(hub, n: int, index: bool = True) -> list[str]:
    """Splits the repository's weights into parts, as save_pretrained names them; the index names these."""
    tensors = load_file(hub.folder / "model.safetensors")
    names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    weight_map = {key: names[i % n] for i, key in enumerate(tensors)}
    for name in names:
        part = {key: tensor for key, tensor in tensors.items() if weight_map[key] == name}
        save_file(part, hub.folder / name, {"format": "pt"})
    if index:
        content = {"metadata": {}, "weight_map": weight_map}
        (hub.folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return names


def test_of_two_sets_of_weights_one_is_fetched(hub, tiny_dir, tmp_path) -> None:
    """That which transformers reads: the whole file, else what the index names, and no parts of another save."""
    parts = in_parts(hub, 2)
    strays = in_parts(hub, 3, index=False)
    assert fetch(hub, tmp_path).returncode == 0
    folder = tmp_path / "checkpoints/org/tiny"
    assert {file.name for file in folder.glob("model*")} == {"model.safetensors"}
    (hub.folder / "model.safetensors").unlink()
    assert fetch(hub, tmp_path, "--checkpoint_dir", "parts").returncode == 0
    found = {file.name for file in (tmp_path / "parts").glob("model*")}
    assert found == {*parts, "model.safetensors.index.json"} and not found & set(strays)
    assert torch.equal(load_model(tmp_path / "parts").lm_head.weight, load_model(tiny_dir).lm_head.weight)
    (hub.folder / parts[1]).unlink()
    said = line_of(fetch(hub, tmp_path, "--checkpoint_dir", "lacking"))
    assert said == f"error: org/tiny lacks {parts[1]}, which its model.safetensors.index.json names."
    assert not list((tmp_path / "lacking").glob("model-*"))


def test_quantized_weights_cost_no_gigabytes(hub, tmp_path) -> None:
    (hub.folder / "model.safetensors").unlink()
    content = {"weight_map": {"model.layers.0.self_attn.q_proj.qweight": "model-00001-of-00001.safetensors"}}
    (hub.folder / "model-00001-of-00001.safetensors").write_bytes(b"not wanted")
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps(content))
    said = line_of(fetch(hub, tmp_path))
    assert "org/tiny is quantized (GPTQ or AWQ): it holds model.layers.0.self_attn.q_proj.qweight; expected" in said
    assert not hub.requests["GET /cdn/model-00001-of-00001.safetensors"]


@pytest.mark.parametrize("broken", ["cut", "stalled"])
def test_a_download_goes_on_where_it_ended(broken, hub, tiny_dir, tmp_path) -> None:
    """Cut off, in the same run; stalled and killed, in the next."""
    hub.broken, folder = broken, tmp_path / "checkpoints/org/tiny"
    if broken == "stalled":
        process = subprocess.Popen(**command_of(hub, tmp_path), stderr=subprocess.DEVNULL)
        while sum(path.stat().st_size for path in folder.glob("*.partial")) < CHUNK:
            time.sleep(0.1)
        process.kill()
        process.wait()
        assert not (folder / "model.safetensors").exists()
    assert fetch(hub, tmp_path).returncode == 0
    assert hub.ranges == [CHUNK] or (broken == "cut" and CHUNK <= hub.ranges[-1] <= CHUNK + 1000)
    assert (folder / "model.safetensors").read_bytes() == (tiny_dir / "model.safetensors").read_bytes()
    assert not list(folder.glob(".*"))


def test_a_file_that_is_not_what_the_hub_says(hub, tmp_path) -> None:
    hub.swapped = True
    assert "arrived as" in line_of(fetch(hub, tmp_path))
    assert not list((tmp_path / "checkpoints").rglob("*model.safetensors*"))


def test_what_has_changed_is_fetched_again(hub, tiny_dir, tmp_path) -> None:
    """Also where its size is the same: another revision, and a small file that was edited."""
    assert fetch(hub, tmp_path).returncode == 0
    folder, weights = tmp_path / "checkpoints/org/tiny", tiny_dir / "model.safetensors"
    content = (folder / "tokenizer_config.json").read_bytes()
    (folder / "tokenizer_config.json").write_bytes(content[:-1] + b" ")
    hub.swapped = True  # a change that fails halfway leaves nothing of the old weights
    assert "arrived as" in line_of(fetch(hub, tmp_path, "--revision", "step1"))
    assert not (folder / "model.safetensors").exists()
    hub.swapped = False
    assert fetch(hub, tmp_path, "--revision", "step1").returncode == 0
    assert (folder / "tokenizer_config.json").read_bytes() == content
    assert (folder / "model.safetensors").read_bytes() == content_of(weights, step=True) != weights.read_bytes()
    result = fetch(hub, tmp_path)
    assert result.returncode == 0 and (folder / "model.safetensors").read_bytes() == weights.read_bytes()
    assert f"Comparing the files in {folder.relative_to(tmp_path)} with the hub's." in result.stderr
    assert hub.requests["GET /cdn/model.safetensors"] == 2 and hub.requests["GET /step1/cdn/model.safetensors"] == 2
    assert not any("/resolve/main/" in request or "/resolve/step1/" in request for request in hub.requests)


def test_other_weights_in_the_folder_are_not_read_in_their_place(hub, tmp_path) -> None:
    folder = tmp_path / "checkpoints/org/tiny"
    folder.mkdir(parents=True)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "holds model.safetensors.index.json, which is not among" in line_of(fetch(hub, tmp_path))
    assert len(list(folder.iterdir())) == 1


def test_space_and_files_that_http_does_not_give(hub, tmp_path) -> None:
    """What waits in .partial is not counted; a file of more than 50 GB names the client that can."""
    hub.sizes = {"model.safetensors": 60 * 10**9}
    assert "model.safetensors holds 60 GB" in (line := line_of(fetch(hub, tmp_path)))
    assert line.endswith("hf download org/tiny --local-dir checkpoints/org/tiny")
    assert not (tmp_path / "checkpoints").exists()
    folder, free = tmp_path / "checkpoints/org/tiny", shutil.disk_usage(tmp_path).free
    folder.mkdir(parents=True)
    with open(folder / f".model.safetensors.{digest(hub.folder / 'model.safetensors')[:12]}.partial", "wb") as partial:
        partial.truncate(40 * 10**9)  # takes no space
    hub.sizes = {"model.safetensors": min(free + 30 * 10**9, 49 * 10**9)}
    if free < 15 * 10**9:
        assert "GB free" not in line_of(fetch(hub, tmp_path))


def test_tokenizer_only_and_another_dtype(hub, tmp_path) -> None:
    assert fetch(hub, tmp_path, "--tokenizer_only", "true", "--checkpoint_dir", "words").returncode == 0
    assert (tmp_path / "words/tokenizer.json").is_file() and not list((tmp_path / "words").glob("*.safetensors"))
    assert fetch(hub, tmp_path, "--dtype", "bfloat16", "--revision", COMMIT).returncode == 0
    folder = tmp_path / "checkpoints/org/tiny"
    assert next(load_model(folder).parameters()).dtype == torch.bfloat16
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    before = hub.requests.total()
    again = fetch(hub, tmp_path, "--dtype", "bfloat16")
    assert again.returncode == 0 and "holds weights in bfloat16 already" in again.stdout
    assert "holds weights in bfloat16. Delete them" in line_of(fetch(hub, tmp_path, "--dtype", "float32"))
    assert hub.requests.total() == before
    # into a folder that has the tokenizer
    flags = ("--checkpoint_dir", "words", "--dtype", "float16")
    assert fetch(hub, tmp_path, *flags, "--tokenizer_only", "true").returncode == 0
    assert not list((tmp_path / "words").glob("*.safetensors"))
    assert fetch(hub, tmp_path, *flags).returncode == 0
    assert next(load_model(tmp_path / "words").parameters()).dtype == torch.float16
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


KILLED = """
import os, runpy, sys
def kill(event, args):  # Python announces a rename before making it
    if event == "os.rename" and kill.moved:
        os._exit(9)
    kill.moved = event == "os.rename" and str(args[1]).endswith("tiny/model.safetensors")
kill.moved = False
sys.addaudithook(kill)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_conversion_that_was_killed_is_finished(hub, tiny_dir, tmp_path) -> None:
    """At once after the weights are in place."""
    job, folder = command_of(hub, tmp_path, "--dtype", "float16"), tmp_path / "checkpoints/org/tiny"
    script = f"import sys; sys.argv = sys.argv[1:]{KILLED}"
    assert subprocess.run(**job | {"args": [sys.executable, "-c", script, *job["args"][1:]]}).returncode == 9
    assert (folder / "model.safetensors").is_file()
    assert fetch(hub, tmp_path, "--dtype", "float16").returncode == 0
    assert {path.name for path in folder.iterdir()} == {path.name for path in tiny_dir.iterdir()}
    assert hub.requests["GET /cdn/model.safetensors"] == 1 and len(list(folder.parent.iterdir())) == 1


def test_into_the_folder_one_is_in(hub, tmp_path) -> None:
    (tmp_path / "here").mkdir()
    flags = ("--checkpoint_dir", ".", "--dtype", "float16")
    job = command_of(hub, tmp_path, *flags) | {"cwd": tmp_path / "here"}
    subprocess.run(**job, check=True)
    assert next(load_model(tmp_path / "here").parameters()).dtype == torch.float16


def test_a_mirror_has_two_names(hub, tmp_path) -> None:
    command = command_of(hub, tmp_path, "--tokenizer_only", "true")
    command["env"]["HF_HUB_ENDPOINT"] = command["env"].pop("HF_ENDPOINT")
    assert subprocess.run(**command).returncode == 0 and hub.requests.total() > 3


def test_what_only_the_name_says_goes_into_config_json(hub, tmp_path) -> None:
    """LongChat's positions: the folder may have any name."""
    code = """
import sys
from pathlib import Path
from lit_gpt import families
from lit_gpt.checkpoint import hub
families.load("llama").EXCEPTIONS["tiny"] = families.load("llama").LONGCHAT
for _ in range(2):
    hub.download("org/tiny", Path("any name"), None, None, tokenizer_only=False)
"""
    subprocess.run(**command_of(hub, tmp_path) | {"args": [sys.executable, "-c", code]}, check=True)
    config = Config.from_checkpoint(tmp_path / "any name")
    assert config.rope_scaling == dict(rope_type="linear", factor=8.0) and config.block_size == 16384
    assert hub.requests["GET /cdn/model.safetensors"] == 1


@pytest.mark.parametrize(
    ("refuse", "flags", "message"),
    [
        ((403, "GatedRepo"), (), "org/tiny is gated: accept its conditions"),
        ((401, "RepoNotFound"), (), "has no model org/tiny, or it is private"),
        ((404, "RepoNotFound"), (), "has no model org/tiny"),
        (None, ("--revision", "v9"), "org/tiny has no revision v9"),
        ((500, None), (), "answered 500 for org/tiny"),
        ((403, None), (), "Check --access_token and its permissions."),
        (
            (401, None, "Invalid credentials in Authorization header"),
            ("--access_token", "hf_old"),
            "Check --access_token and its permissions.",
        ),
        (None, ("--repo_id", "a/b/c"), "--repo_id a/b/c"),
    ],
)
def test_refusals_in_one_line(refuse, flags, message, hub, tmp_path) -> None:
    hub.refuse = refuse
    assert message in line_of(fetch(hub, tmp_path, *flags))
    assert not (tmp_path / "checkpoints").exists()
    assert not list(tmp_path.rglob("*.safetensors")) or (tmp_path / "hub/model.safetensors").is_file()


def test_an_unknown_model_costs_no_gigabytes(hub, tmp_path) -> None:
    config = json.loads((hub.folder / "config.json").read_text()) | {"model_type": "mamba"}
    (hub.folder / "config.json").write_text(json.dumps(config))
    assert "model_type 'mamba'; known are" in line_of(fetch(hub, tmp_path))
    assert not any("cdn" in request for request in hub.requests)


def test_what_no_checkpoint_is(hub, tmp_path) -> None:
    """An adapter, a GGUF file or a model in a subfolder are named, also if only the tokenizer is asked for."""
    for file in list(hub.folder.iterdir()):
        file.unlink()
    (hub.folder / "part").mkdir()
    for name, said in (
        ("part/config.json", "There is part/config.json: fetch that folder"),
        ("a.Q4_0.gguf", "It holds GGUF files: hf download org/tiny a.Q4_0.gguf"),
        ("adapter_config.json", "It is an adapter of peft"),
    ):
        (hub.folder / name).write_text("{}")
        assert f"org/tiny has no config.json, so that nothing says what its weights are. {said}" in line_of(
            fetch(hub, tmp_path)
        )
    assert f"org/tiny has no tokenizer. {said}" in line_of(fetch(hub, tmp_path, "--tokenizer_only"))
    assert not (tmp_path / "checkpoints").exists()


def test_an_adapter_beside_the_model_is_told(hub, tmp_path) -> None:
    (hub.folder / "adapter_config.json").write_text("{}")
    done = fetch(hub, tmp_path)
    assert done.returncode == 0 and "org/tiny holds an adapter of peft, too, which is left aside" in done.stderr
    assert not (tmp_path / "checkpoints/org/tiny/adapter_config.json").exists()


def test_a_mirror_that_tells_no_sizes(hub, tmp_path) -> None:
    """Nothing tells whether what is there is the hub's: it is fetched again, and a partial file is not continued."""
    hub.tells_little = True
    for _ in range(2):
        assert fetch(hub, tmp_path).returncode == 0
    assert hub.requests["GET /cdn/model.safetensors"] == 2
    load_model(tmp_path / "checkpoints/org/tiny")


def test_tokens_as_they_are_pasted(hub, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine\n")
    assert fetch(hub, tmp_path, "--tokenizer_only", "--access_token", "").returncode == 0
    assert hub.tokens - {None} == {"Bearer hf_mine"}
    said = "--access_token (or HF_TOKEN) has a space or a letter that no token has"
    assert said in line_of(fetch(hub, tmp_path, "--access_token", "hf_mïne"))
    for token in ("hf_a hf_b", "hf_a\nhf_b"):
        with pytest.raises(InputError, match=re.escape(said)):
            read_token(token)


def test_a_server_that_is_not_there(hub, tmp_path) -> None:
    hub.shutdown()
    hub.server_close()
    assert "cannot be reached" in line_of(fetch(hub, tmp_path)) or "broke" in line_of(fetch(hub, tmp_path))


def test_names_are_listed(tmp_path) -> None:
    output = python(ROOT / "scripts/download.py", cwd=tmp_path, check=True).stdout
    assert "7.24 B parameters     14.5 GB in 16 bits   mistralai/Mistral-7B-v0.1" in output
    assert len(output.splitlines()) > 90 and Config.from_name("Mistral-7B-v0.1")

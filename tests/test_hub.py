"""Pushing to the Hub, against a Hub of our own on loopback: one commit, no token in any file, and a failed push harms
nothing."""

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import numpy as np
import peft
import pytest
import reference
import tiny_run
import transformers
from huggingface_hub import ModelCard
from safetensors.numpy import save_file

import jaxtune
from jaxtune import export, results
from jaxtune.errors import NetworkError, UserError
from jaxtune.hf import hub
from jaxtune.hf.card import Run, card

# huggingface_hub's own, about how it calls its HTTP library to upload a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_" + "CanaryCanaryCanaryCanary"


class Hub(http.server.ThreadingHTTPServer):
    """As much of the Hub's API as a push asks for.  `calls`: (path, headers, body); `fail`: {part of a path: status};
    `stored`: files in the repository before."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls, self.fail, self.stored, self.large = [], {}, [], {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self, part):
        return [call for call in self.calls if part in call[0]]

    def commit(self):
        """(summary, {path: bytes}, deleted paths) of the only commit."""
        ((_, _, body),) = self.paths("/commit/")
        lines = [json.loads(line) for line in body.splitlines()]
        files = {v["path"]: base64.b64decode(v["content"]) for v in (x["value"] for x in lines if x["key"] == "file")}
        files |= {x["value"]["path"]: self.large[x["value"]["oid"]] for x in lines if x["key"] == "lfsFile"}
        deleted = [x["value"]["path"] for x in lines if x["key"] == "deletedFile"]
        return lines[0]["value"]["summary"], files, deleted


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def handle_any(self):
        body = self.body()
        self.server.calls.append((self.path, dict(self.headers), body))
        for part, status in self.server.fail.items():
            if part in self.path:
                return self.answer({"error": "as the test wants it"}, status)
        url = self.server.url
        if self.path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            good = re.match(r"---\n.*?\n---\n", content, re.DOTALL) and "base_model: /" not in content
            return self.answer({"errors": [] if good else [{"message": "bad"}], "warnings": []}, 200 if good else 400)
        if self.path == "/api/repos/create":
            wish = json.loads(body)
            return self.answer({"url": f"{url}/{wish.get('organization') or 'me'}/{wish['name']}"})
        if "/tree/" in self.path:
            return self.answer([{"type": "file", "path": p, "size": 1, "oid": "0" * 40} for p in self.server.stored])
        if "/preupload/" in self.path:
            modes = [
                (f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular")
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "authenticated": True, "actions": {"upload": {"href": f"{url}/put/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if self.path.startswith("/put/"):
            self.server.large[hashlib.sha256(body).hexdigest()] = body
            return self.answer({})
        if "/commit/" in self.path:
            where = f"{url}/{self.path.split('/')[3]}/{self.path.split('/')[4]}/commit/{'a' * 40}"
            return self.answer({"commitOid": "a" * 40, "commitUrl": where, "success": True})
        return self.answer({"error": f"the test's Hub knows no {self.path}"}, 404)

    do_GET = do_POST = do_PUT = handle_any


@pytest.fixture
def server(monkeypatch):
    hub_ = Hub()
    threading.Thread(target=hub_.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub_.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub_
    hub_.shutdown()
    hub_.server_close()


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """(checkpoint directory, a PEFT directory that jaxtune wrote over it)."""
    _, directory = checkpoint("gemma2")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    reference.adapt(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path / "theirs")
    words = ["--base", str(directory), "--base_model_name_or_path", "org/base"]
    assert export.main([str(tmp_path / "theirs"), "--out", str(tmp_path / "adapter"), *words]) == 0
    return directory, tmp_path / "adapter"


def clean(calls, *roots):
    """The token is in the Authorization header of calls that need it, and in nothing else."""
    for path, headers, body in calls:
        others = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        assert TOKEN not in path and TOKEN not in str(others) and TOKEN.encode() not in body
    assert any(TOKEN in headers.get("Authorization", headers.get("authorization", "")) for _, headers, _ in calls)
    for root in roots:
        for file in root.rglob("*"):
            assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


def test_one_commit_has_everything(server, adapter, tmp_path, capsys):
    directory, where = adapter
    (where / "optimizer.pt").write_bytes(b"a pickle that lies there")
    assert export.main([str(where), "--push_to_hub", "me/x", "--private"]) == 0
    summary, files, deleted = server.commit()
    assert summary and not deleted
    assert files == {path.name: path.read_bytes() for path in where.iterdir() if path.suffix != ".pt"}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    ((_, _, wish),) = server.paths("/repos/create")
    assert json.loads(wish)["visibility"] == "private"
    assert len(server.paths("/validate-yaml")) >= 1 and server.calls[0][0] == "/api/validate-yaml"
    clean(server.calls, tmp_path)
    assert f"pushed: {server.url}/me/x/commit/aaa" in capsys.readouterr().out
    assert directory.is_dir()


def test_a_merged_model_replaces_the_shards_of_the_last(server, adapter, tmp_path):
    directory, where = adapter
    server.stored = [
        "model-00001-of-00009.safetensors",
        "adapter_model.safetensors",
        ".gitattributes",
        "model.safetensors",
    ]
    words = ["--merged", "--base", str(directory), "--out", str(tmp_path / "merged"), "--max_shard_size", "200KB"]
    assert export.main([str(where), *words, "--push_to_hub", "x"]) == 0
    _, files, deleted = server.commit()
    assert deleted == ["model-00001-of-00009.safetensors", "model.safetensors"]
    assert "model.safetensors.index.json" in files and "me/x" in server.paths("/commit/")[0][0]
    assert "base_model" not in ModelCard((tmp_path / "merged" / "README.md").read_text()).data.to_dict()


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ({"/repos/create": 401}, r"the token is not valid \(401\)"),
        ({"/commit/": 403}, r"the token may not write there \(403\)"),
        ({"/repos/create": 500}, "500 Internal Server Error"),
        ({"/validate-yaml": 503}, "503 Service Unavailable"),
        (None, "Connect"),
    ],
)
def test_a_failed_push_leaves_the_adapter_and_the_command(server, adapter, tmp_path, fail, message):
    directory, where = adapter
    before = jaxtune.load(directory, adapter=where).logits(np.array([[5, 6, 7]]))
    if fail is None:
        server.shutdown()
        server.server_close()
    server.fail = fail or {}
    with pytest.raises(NetworkError, match=message) as error:
        export.main([str(where), "--push_to_hub", "me/x", "--private"])
    assert error.value.exit_code == 69
    assert f"python -m jaxtune.export {where} --push_to_hub me/x --private" in str(error.value)
    assert TOKEN not in str(error.value)
    np.testing.assert_array_equal(jaxtune.load(directory, adapter=where).logits(np.array([[5, 6, 7]])), before)
    if fail:
        assert len(server.paths("/commit/")) == ("/commit/" in fail)
        server.fail = {}
        assert not server.calls.clear() and export.main([str(where), "--push_to_hub", "me/x", "--private"]) == 0
        assert len(server.commit()[1]) == 3
        clean(server.calls, tmp_path)


def test_the_hub_refuses_a_card(server, adapter):
    _, where = adapter
    (where / "README.md").write_text("---\nbase_model: /home/me/gemma\n---\n")
    with pytest.raises(UserError, match="The Hub refuses"):
        export.main([str(where), "--push_to_hub", "me/x"])
    assert not server.paths("/repos/create")


class TestRefusedBeforeTheNetwork:
    @pytest.fixture(autouse=True)
    def nothing_sent(self, server):
        yield
        assert not server.calls

    @pytest.mark.parametrize("name", ["a/b/c", "me/my adapter", "../x", "me/" + "x" * 300])
    def test_names(self, name):
        with pytest.raises(UserError, match="is no name of a repository"):
            hub.check(name)

    def test_no_token(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        with pytest.raises(UserError, match="Set HF_TOKEN, or run `hf auth login`"):
            hub.check("me/x")

    def test_a_token_on_the_command_line(self):
        with pytest.raises(UserError, match="looks like a secret") as error:
            export.main(["runs/x", "--push_to_hub", TOKEN])
        assert TOKEN not in str(error.value)

    def test_a_base_that_others_cannot_find(self, adapter, tmp_path):
        directory, _ = adapter
        words = ["--base", str(directory), "--base_model_name_or_path", str(directory)]
        assert export.main([str(tmp_path / "theirs"), "--out", str(tmp_path / "local"), *words]) == 0
        with pytest.raises(UserError, match="base_model_name_or_path"):
            export.main([str(tmp_path / "local"), "--push_to_hub", "me/x"])

    def test_damaged_weights(self, adapter):
        _, where = adapter
        save_file({"a": np.array([np.nan], np.float32)}, where / "adapter_model.safetensors")
        with pytest.raises(UserError, match="not finite"):
            export.main([str(where), "--push_to_hub", "me/x"])

    def test_by_a_run_before_it_reads_anything(self):
        section = {"push_to_hub": "me/x", "base_model_name_or_path": None, "format": None}
        with pytest.raises(UserError, match="names its base by a Hub id"):
            results.check_push({"export": section, "model": {"id": "./gemma"}, "peft": {"method": "lora"}})
        results.check_push({"export": section, "model": {"id": "./gemma"}, "peft": {"method": "full"}})
        results.check_push({"export": section | {"push_to_hub": None}})

    def test_nothing_there(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(UserError, match="holds no export"):
            export.main([str(tmp_path), "--push_to_hub", "me/x"])


CONFIG = {
    "model": {"id": "google/gemma-2-2b-it", "revision": None},
    "peft": {"method": "lora"},
    "data": {
        "train": "org/rows",
        "eval": "/home/me/secret-project/held.jsonl",
        "prompt": "Write:\n```\n{x}\n```",
        "name": None,
    },
    "export": {"language": ["fa", "en"], "push_to_hub": "me/x"},
}


class TestCard:
    def test_what_the_hub_reads(self):
        scores = {"step": 9, "eval_loss": 1.25, "exact_match_before": 0.0, "exact_match_after": 0.5}
        text = card("adapter", "google/gemma-2-2b-it", "lora", Run(CONFIG, scores), "me/x")
        data = ModelCard(text).data.to_dict()
        assert data["base_model"] == "google/gemma-2-2b-it" and data["library_name"] == "peft"
        assert data["datasets"] == ["org/rows"] and data["language"] == ["fa", "en"]
        assert {"lora", "jaxtune", "base_model:adapter:google/gemma-2-2b-it"} <= set(data["tags"])
        ((results,),) = [entry["results"] for entry in data["model-index"]]
        assert results["dataset"] == {"name": "held.jsonl", "type": "json"}
        assert {m["type"]: m["value"] for m in results["metrics"]} == {"loss": 1.25, "exact_match": 0.5}

    def test_what_people_read(self):
        text = card("adapter", "google/gemma-2-2b-it", "lora", Run(CONFIG, {}), "me/x")
        assert 'peft.PeftModel.from_pretrained(base, "me/x")' in text
        assert 'jaxtune.load("google/gemma-2-2b-it", adapter=huggingface_hub.snapshot_download("me/x"))' in text
        found = re.search(r"\n(`{4,})json\n(.*?)\n\1\n", text, re.DOTALL)
        shown = json.loads(found[2])
        assert shown["data"] == {"train": "org/rows", "eval": "held.jsonl", "prompt": CONFIG["data"]["prompt"]}
        assert "secret-project" not in text

    def test_local_names_are_no_metadata(self, tmp_path):
        config = CONFIG | {"data": {"train": "rows.jsonl", "eval": None}, "export": {}}
        text = card("merged", str(tmp_path), "dora", Run(config, {"eval_loss": float("nan")}))
        data = ModelCard(text).data.to_dict()
        assert not {"base_model", "datasets", "language", "model-index"} & set(data)
        assert data["library_name"] == "transformers" and str(tmp_path) not in text


@pytest.mark.slow
def test_the_training_command_pushes_at_its_end(server, tmp_path):
    """Whole processes: a run whose push fails is a finished run that says what to type, and that then works."""
    place = tiny_run.make(tmp_path, steps=2)
    settings = ["export.push_to_hub=me/x", "export.base_model_name_or_path=org/base", "export.language=fa"]
    environment = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    server.fail = {"/repos/create": 401}
    assert tiny_run.start(place, tmp_path / "run", *settings, **environment).wait() == 0
    screen = (tmp_path / "run.screen").read_text()
    assert "WARNING: me/x was not pushed to: the token is not valid (401)" in screen
    command = re.search(r"python -m (jaxtune.export \S+ --push_to_hub me/x)\n", screen)[1]

    server.fail = {}
    server.calls.clear()
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    _, files, _ = server.commit()
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md", "jaxtune.json"}
    data = ModelCard(files["README.md"].decode()).data.to_dict()
    assert data["base_model"] == "org/base" and data["language"] == "fa"
    clean(server.calls, tmp_path)

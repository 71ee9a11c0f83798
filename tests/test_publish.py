"""Uploads to a Hub of this process: what is sent, what is refused, and that no path goes along."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from expunge import publish
from expunge.errors import RunError
from expunge.pipeline import Pipeline
from expunge.publish import Place

BRANCH = {
    "terms": [{"half": "forget", "loss": "npo"}],
    "lora": {"rank": 2, "alpha": 4},
    "schedule": {"epochs": 1},
    "optimizer": {"lr": 1e-3, "compute": "float32"},
}
BASE = "owner/base"


class Hub(BaseHTTPRequestHandler):
    """Takes every file as it is, and keeps what it was told."""

    told: list[tuple[str, object]]
    status = 200

    def answer(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"])).decode()
        path = self.path.partition("?")[0]
        if "/commit/" in path:
            said = [json.loads(line) for line in raw.splitlines()]
        else:
            said = json.loads(raw)
        type(self).told.append((path, said))
        url = f"http://{self.headers['Host']}/owner/model"
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in said["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in path:
            return self.answer({"commitUrl": f"{url}/commit/0", "commitOid": "0", "success": True})
        return self.answer({"url": url, "warnings": [], "errors": []})

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine; its class holds what it was told."""
    handler = type("Handler", (Hub,), {"told": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for module in (huggingface_hub.constants, huggingface_hub.hf_api.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(module, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.close_session()  # it keeps whether it is offline
    yield handler
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("publish") / "run"
    recipe = {
        "name": "tiny",
        "model": {"path": str(tiny_folder), "separator": " "},
        "data": {"synthetic": {"documents": 1, "nonmembers": 1}},
        "branches": {"strong": BRANCH, "weak": BRANCH},
        "merges": {"merged": {"method": "ties", "space": "delta", "output": "model"}},
        "evaluate": {"max_new_tokens": 2, "resamples": 10},
        "unscored": ["weak"],
    }
    Pipeline(recipe, root).report(42)
    return root


def sent(hub: type[Hub]) -> tuple[dict, dict[str, bytes]]:
    """The header of the commit, and its files."""
    (lines,) = [said for path, said in hub.told if "/commit/" in path]
    header, *files = lines
    assert header["key"] == "header"
    found = {f["value"]["path"]: base64.b64decode(f["value"]["content"]) for f in files}
    return header["value"], found


def test_an_adapter_goes_with_its_card_and_without_a_path(hub, run):
    made = publish.push(run, "strong", Place("owner/model"), base=BASE, anyway=True)
    assert made["url"].endswith("/owner/model")
    header, files = sent(hub)
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert header["summary"].startswith("tiny strong, seed 42: expunge 0.1.0, commit ")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    card = ModelCard(files["README.md"].decode())
    assert 'PeftModel.from_pretrained(model, "owner/model")' in card.text
    assert f'base = "{BASE}"' in card.text
    weights = next(run.glob("stages/strong-*/adapter/adapter_model.safetensors"))
    assert files["adapter_model.safetensors"] == weights.read_bytes()
    assert not [name for name, content in files.items() if str(run.parent).encode() in content]
    kept = weights.with_name("adapter_config.json").read_text()
    assert BASE not in kept  # control: what lies in the run is left as it was


def test_a_model_goes_whole_to_a_private_branch(hub, run):
    place = Place("owner/model", private=True, revision="v1")
    publish.push(run, "merged", place, anyway=True)
    _, files = sent(hub)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(files)
    assert "stage.json" not in files
    assert ("/api/models/owner/model/branch/v1", {}) in hub.told
    assert any(path.endswith("/commit/v1") for path, _ in hub.told)
    (made,) = [said for path, said in hub.told if path == "/api/repos/create"]
    assert made["name"] == "model"
    assert made["organization"] == "owner"
    assert made.get("private") is True or made.get("visibility") == "private"


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("strong", {"base": BASE}, "'strong' has collapsed"),
        ("weak", {"base": BASE}, "'weak' has not been evaluated"),
        ("strong", {"anyway": True}, "--base OWNER/NAME"),
        ("strong", {"base": "a b"}, "'a b' is no repository"),
    ],
)
def test_what_should_not_go_is_refused_before_anything_is_sent(hub, run, name, given, said):
    with pytest.raises(RunError, match=said):
        publish.push(run, name, Place("owner/model"), **given)
    assert hub.told == []


def test_without_a_token_nothing_is_sent(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(publish, "get_token", lambda: None)
    with pytest.raises(RunError, match="no token for the Hub"):
        publish.push(run, "strong", Place("owner/model"), base=BASE, anyway=True)
    assert hub.told == []


def test_what_the_hub_refuses_is_one_line(hub, run):
    hub.status = 403
    with pytest.raises(RunError, match="cannot upload to owner/model") as caught:
        publish.push(run, "strong", Place("owner/model"), base=BASE, anyway=True)
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_offline_nothing_is_sent(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(RunError, match="cannot upload to owner/model"):
        publish.push(run, "strong", Place("owner/model"), base=BASE, anyway=True)

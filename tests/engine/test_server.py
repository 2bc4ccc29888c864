"""vLLM's OpenAI server, two replicas, updated over HTTP again and again while clients generate."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import pytest
import requests
from safetensors.torch import save_file

from flashquant.cli.main import main
from flashquant.sender import BundleStore, Manifest, Sender
from tests.engine.serving import KNOWS_VERSION, serve
from tests.support import forked
from tools.models import tiny_models
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

UPDATES, CLIENTS = 50, 8
PROMPT = list(range(5, 45))


class Server(NamedTuple):
    """A running server, and where it takes files from."""

    url: str
    scheme: str
    folder: Path
    log: Path

    def post(self, route: str, **body: Any) -> Any:
        answer = requests.post(f"{self.url}/{route}", json=body, timeout=120)
        assert answer.ok, f"{route}: {answer.text}\n{self.log.read_text()[-3000:]}"
        return answer.json()

    def complete(self, tokens: int) -> list[int]:
        """Greedy tokens."""
        answer = self.post(
            "v1/completions",
            model="tiny",
            prompt=PROMPT,
            max_tokens=tokens,
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
        )
        return list(answer["choices"][0]["token_ids"])

    def update(self, file: str) -> None:
        """One whole update, as a trainer drives it."""
        self.post("start_weight_update")
        self.post("update_weights", update_info={"path": file})
        self.post("finish_weight_update")


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(scope="module", params=["int8", "fp8_vllm"])
def server(
    request: pytest.FixtureRequest, policies: Policies, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Nothing in it imports flashquant but vLLM's own plugin loader."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cores = sorted(os.sched_getaffinity(0))
    command = {
        "--model": tiny_models.add_tokenizer(policies.bf16("a")),
        "--served-model-name": "tiny",
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": "bfloat16",
        "--max-model-len": 128,
        "--kv-cache-memory-bytes": 16 << 20,
        "--data-parallel-size": 2,
        "--weight-transfer-config": '{"backend": "flashquant_file"}',
    }
    environment = {
        **os.environ,
        "FLASHRL_CONFIG": request.param,
        "VLLM_SERVER_DEV_MODE": "1",  # its weight-update routes
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}",
    }
    folder = tmp_path_factory.mktemp("transfer")
    log = folder / "server.log"
    arguments = [*(part for pair in command.items() for part in pair), "--enforce-eager"]
    process = forked.start("vllm.entrypoints.openai.api_server", arguments, environment, log)
    found = Server(f"http://127.0.0.1:{port}", request.param, folder, log)
    try:
        _wait_for(found, process)
        for policy in "ab":
            weights = policies.bf16(policy) / "model.safetensors"
            shutil.copy(weights, folder / f"{policy}.safetensors")
        found.post("init_weight_transfer_engine", init_info={"folder": str(folder)})
        yield found
    finally:
        process.terminate()
        assert forked.end([process], 60) != [None]


def _wait_for(server: Server, process: BaseProcess) -> None:
    for _ in range(600):
        try:
            if requests.get(f"{server.url}/health", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.5)
        assert process.exitcode is None, server.log.read_text()[-3000:]
    raise TimeoutError(server.log.read_text()[-3000:])


def test_fifty_updates_over_http_while_eight_clients_generate(
    server: Server, policies: Policies
) -> None:
    """No request fails, and both replicas end on what a fresh engine serves."""
    enough = Event()

    def client() -> int:
        answered = 0
        while not enough.is_set():
            server.complete(16)
            answered += 1
        return answered

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client) for _ in range(CLIENTS)]
        for update in range(UPDATES):
            server.update(f"{'ba'[update % 2]}.safetensors")
        by_path = {"weights_path": str(policies.bf16("b"))}
        server.post("collective_rpc", method="reload_weights", kwargs=by_path)
        enough.set()
        answered = [future.result() for future in clients]

    fresh = serve(policies.bf16("b"), server.scheme)
    expected = [token for token, _ in fresh.continued(PROMPT, 16)]
    assert min(answered) > 0
    assert server.post("collective_rpc", method="flashquant_status")["results"][0]["digest"] == (
        fresh.start.digest
    )
    # The replicas take turns.
    assert [server.complete(16) for _ in range(8)] == [expected] * 8
    if KNOWS_VERSION:
        version = requests.get(f"{server.url}/weight_info", timeout=10).json()["weight_version"]
        assert version == str(UPDATES + 1)


def test_a_refused_update_over_http_leaves_the_server_as_it_was(server: Server) -> None:
    """The client sees an error; both replicas serve on, and the next update goes through."""
    before = server.complete(16)
    server.post("start_weight_update")
    refusal = requests.post(
        f"{server.url}/update_weights",
        json={"update_info": {"path": "../../etc/passwd"}},
        timeout=60,
    )

    assert refusal.status_code == 500
    assert [server.complete(16) for _ in range(4)] == [before] * 4
    server.update("a.safetensors")
    assert server.complete(16) != before


def test_whoever_pauses_or_resumes_during_an_update_has_their_way(server: Server) -> None:
    """A pause stays; who resumes too early waits for the end of the update, and loses nothing."""

    def is_paused() -> bool:
        return bool(requests.get(f"{server.url}/is_paused", timeout=10).json()["is_paused"])

    server.post("start_weight_update")
    server.post("pause?mode=keep")
    server.post("update_weights", update_info={"path": "b.safetensors"})
    server.post("finish_weight_update")
    assert is_paused()
    server.post("resume")
    b = server.complete(16)

    server.post("pause?mode=keep")
    server.post("start_weight_update")
    server.post("resume")
    server.post("update_weights", update_info={"path": "a.safetensors"})
    with ThreadPoolExecutor(2) as pool:  # one for each replica
        waiting = [pool.submit(server.complete, 16) for _ in range(2)]
        time.sleep(1)
        assert not any(answer.done() for answer in waiting)
        server.post("finish_weight_update")
        first, second = (answer.result() for answer in waiting)
    assert first == second != b
    assert not is_paused()


def test_bundles_of_a_folder_come_in_by_flashquant_sync(
    server: Server, policies: Policies, tmp_path: Path
) -> None:
    """The first one whole, then what changed; both replicas, and no client but the command."""
    server.update("b.safetensors")
    expected = server.complete(16)
    server.update("a.safetensors")
    wanted = server.post("collective_rpc", method="flashquant_manifest")["results"][0]["answer"]
    sender, store = Sender(Manifest.model_validate(wanted), delta=True), BundleStore(tmp_path)
    follow = ["sync", "--from", str(tmp_path), "--to", server.url, "--once"]

    for policy in "ab":
        store.put(sender.bundle(policies.tensors(policy)))
        assert main(follow) == 0

    assert [server.complete(16) for _ in range(8)] == [expected] * 8
    assert [path.name.split("-")[1] == "whole" for path in store.path_from(None)] == [True, False]


TRAINER = """
import requests, sys, time
url = sys.argv[1]
assert requests.post(f"{url}/start_weight_update", json={}, timeout=60).ok
half = {"update_info": {"path": "half.safetensors"}}
assert requests.post(f"{url}/update_weights", json=half, timeout=60).ok
print("half", flush=True)
time.sleep(600)
"""


def test_a_trainer_that_is_killed_leaves_a_server_that_the_next_one_updates(
    server: Server, policies: Policies
) -> None:
    """Clients that wait meanwhile give up, `status` is asked, and the engines live."""
    weights = list(policies.tensors("b").items())
    save_file(dict(weights[: len(weights) // 2]), server.folder / "half.safetensors")
    server.update("b.safetensors")
    expected = server.complete(16)
    server.update("a.safetensors")
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, server.url], stdout=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "half\n"
        trainer.kill()

    for _ in range(2):  # one for each replica
        with pytest.raises(requests.Timeout):
            requests.post(
                f"{server.url}/v1/completions",
                json={"model": "tiny", "prompt": PROMPT, "max_tokens": 16},
                timeout=2,
            )
        server.post("collective_rpc", method="flashquant_status")
    server.update("b.safetensors")

    assert [server.complete(16) for _ in range(4)] == [expected] * 4


def test_every_process_of_the_server_says_that_it_is_patched(server: Server) -> None:
    """The plugin is all it takes."""
    said = re.findall(r"flashquant (\w+).*: patched \d+ points", server.log.read_text())

    assert said.count("APIServer") + said.count("MainProcess") >= 1
    assert sum(name.startswith("EngineCore") for name in said) == 2

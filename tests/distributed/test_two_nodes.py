"""A run on two nodes: network namespaces of this machine, each with an address of its own, and a link between them."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from rich.console import Console

from llava_npu import UserError
from llava_npu.distributed import processes
from llava_npu.distributed.launching import meeting_port
from llava_npu.training import train
from llava_npu.training.checkpointing.checkpoints import checkpoints
from llava_npu.training.monitoring.metrics import read_metrics
from support import dying_node
from support.small_run import small_run, write_material


@dataclass(frozen=True)
class Nodes:
    """Names of two namespaces, and the address of the first."""

    names: tuple[str, str]
    address: str

    def start(self, number: int, command: list[str], port: int) -> subprocess.Popen[str]:
        """Starts `torchrun` on one of them, with one process, as docs/training.md says."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        launcher += ["--node-rank", str(number), "--master-addr", self.address, "--master-port", str(port)]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[number], *launcher, *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    if shutil.which("ip") is None:
        pytest.skip("two nodes need iproute2 (`ip netns`)")
    mark = secrets.token_hex(3)
    names, links, subnet = (f"node-{mark}-0", f"node-{mark}-1"), (f"v{mark}0", f"v{mark}1"), secrets.randbelow(250)
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for number, (name, link) in enumerate(zip(names, links, strict=True)):
            _ip("link", "set", link, "netns", name)
            _ip("-n", name, "addr", "add", f"10.213.{subnet}.{number + 1}/24", "dev", link)
            for each in ("lo", link):
                _ip("-n", name, "link", "set", each, "up")
        yield Nodes(names, f"10.213.{subnet}.1")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this user may not make network namespaces: {error.stderr.strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.slow
def test_a_node_dies_and_one_goes_on(nodes: Nodes, tmp_path: Path) -> None:
    """Weights are held whole on each node (hybrid sharding), gradients are sent between them."""
    material = write_material(tmp_path)
    changes = {"max_steps": 4, "batch_size": 4, "save_every": 1, "engine": "fsdp2"}
    run = small_run(material, tmp_path / "run", "cpu", **changes, engine_options={"shard_group": 1})
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    port = meeting_port()
    dying = [dying_node.__file__, "3", str(config)]
    started = [nodes.start(0, ["-m", "llava_npu", "train", str(config)], port), nodes.start(1, dying, port)]
    try:
        said = [process.communicate(timeout=500)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert "on 2 × " in said[0], said[0]
    assert started[0].returncode != 0
    assert started[1].returncode != 0
    lost = "error: process 0 lost its connection to another one: that process, its machine or the network failed"
    assert said[0].replace("\n", " ").count(lost) == 1, said[0]
    assert "Traceback" not in said[0].split("error: process 0")[0]
    assert checkpoints(run.output_path)[0].step == 2
    train(run.model_copy(update={"engine": "ddp", "engine_options": {}}), console=Console(quiet=True))
    alone = small_run(material, tmp_path / "alone", "cpu", **{**changes, "engine": "ddp"})
    train(alone, console=Console(quiet=True))
    losses, expected = ([line["loss"] for line in read_metrics(each.output_path)] for each in (run, alone))
    assert len(losses) == 4
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process is told that it is the second of two."""
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_closed_port_is_named(second_of_two: pytest.MonkeyPatch) -> None:
    second_of_two.setenv("LLAVA_NPU_MEETING_SECONDS", "1")
    with pytest.raises(UserError) as raised:
        processes.form_group("gloo")
    message = str(raised.value)
    assert "process 1 did not meet all 2 processes at MASTER_ADDR:MASTER_PORT=127.0.0.1:1 within 1 s" in message
    assert "firewalls" in message
    assert "LLAVA_NPU_MEETING_SECONDS" in message


def test_a_process_that_cannot_be_reached_is_named(second_of_two: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with [pair.cc:152] Connection refused, remote=[127.0.0.1]:4\n…")

    second_of_two.setenv("GLOO_SOCKET_IFNAME", "lo")
    second_of_two.setattr(processes, "_rendezvous", lambda: (dist.HashStore(), 1, 2))
    second_of_two.setattr(dist, "init_process_group", fails)
    with pytest.raises(UserError, match="process 1 met the others at") as raised:
        processes.form_group("gloo")
    assert "remote=[127.0.0.1]:4)" in str(raised.value)
    assert "(now: lo)" in str(raised.value)


@pytest.mark.parametrize("local", ["1", "2"])
def test_gloo_gets_the_interface_between_nodes(local: str, second_of_two: pytest.MonkeyPatch) -> None:
    own = socket.gethostbyname(socket.gethostname())
    second_of_two.setenv("MASTER_ADDR", own)
    second_of_two.setenv("LOCAL_WORLD_SIZE", local)
    second_of_two.delenv("GLOO_SOCKET_IFNAME", raising=False)
    interfaces = {"lo": ["127.0.0.1"], "eth7": [own]}
    addresses = {name: [type("", (), {"address": each}) for each in found] for name, found in interfaces.items()}
    second_of_two.setattr("psutil.net_if_addrs", lambda: addresses)
    processes._choose_interface()
    assert os.environ.pop("GLOO_SOCKET_IFNAME", None) == ("eth7" if local == "1" else None)

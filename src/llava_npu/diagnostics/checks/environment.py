"""Environment variables that stop or slow a run, and ports that are taken."""

from __future__ import annotations

from collections.abc import Iterator

from llava_npu.diagnostics.findings import Finding, error, ok, warning
from llava_npu.diagnostics.machine import Machine


def visible_devices(machine: Machine) -> Iterator[Finding]:
    value = machine.environment.get("ASCEND_RT_VISIBLE_DEVICES")
    if value is None:
        return
    indices = value.split(",")
    if not all(index.strip().isdigit() for index in indices) or len(set(indices)) != len(indices):
        yield error(
            "visible devices",
            f"ASCEND_RT_VISIBLE_DEVICES={value!r}",
            "CANN takes whole numbers with commas, each once; with anything else it shows no device.",
            "export ASCEND_RT_VISIBLE_DEVICES=0,1",
        )
    else:
        yield ok("visible devices", f"ASCEND_RT_VISIBLE_DEVICES={value}")


def allocator(machine: Machine) -> Iterator[Finding]:
    for name in ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        value = machine.environment.get(name)
        if value is None:
            continue
        options = dict(part.strip().partition(":")[::2] for part in value.split(","))
        expandable = options.get("expandable_segments", "").strip().lower() == "true"
        if expandable and "max_split_size_mb" in options:
            yield error(
                "allocator",
                f"{name}={value}",
                "expandable_segments and max_split_size_mb exclude each other (vllm-ascend pull request 5855).",
                f"export {name}=expandable_segments:True",
            )
        else:
            yield ok("allocator", f"{name}={value}")


def communication(machine: Machine) -> Iterator[Finding]:
    environment = machine.environment
    named = {name: value for name, value in environment.items() if name.startswith(("HCCL_", "NCCL_", "GLOO_"))}
    if named:
        yield ok("communication", ", ".join(f"{name}={value}" for name, value in named.items()))
    for name, default in (("HCCL_CONNECT_TIMEOUT", 120), ("HCCL_EXEC_TIMEOUT", 1836)):
        value = environment.get(name)
        unlimited = name == "HCCL_EXEC_TIMEOUT" and value == "0"
        if value is not None and not unlimited and not (value.isdigit() and int(value) >= default):
            yield warning(
                "communication",
                f"{name}={value}; the default is {default} seconds",
                "Processes that load or save at different speeds then end in a timeout (error EI0006).",
                f"unset {name}" + (" (llava-npu sets 1200)" if default == 120 else ""),
            )
    base = environment.get("HCCL_IF_BASE_PORT")
    if base is not None and not (base.isdigit() and 1024 <= int(base) <= 65520):
        yield error(
            "communication",
            f"HCCL_IF_BASE_PORT={base}",
            "HCCL takes a whole number from 1024 to 65520.",
            "unset HCCL_IF_BASE_PORT (llava-npu chooses one for each job)",
        )


def ports(machine: Machine) -> Iterator[Finding]:
    environment, taken = machine.environment, machine.taken_ports
    master = environment.get("MASTER_PORT", "")
    if master.isdigit() and int(master) in taken:
        yield error(
            "ports",
            f"MASTER_PORT={master} is in use",
            "The processes of a run meet at this port; it would wait for the others, then fail.",
            "Choose another: export MASTER_PORT=29517, or torchrun --master-port=0 for any free one",
        )
    if any(str(port) != master for port in taken):
        numbers = ", ".join(str(port) for port in taken if str(port) != master)
        yield error(
            "ports",
            f"HCCL_IF_BASE_PORT={environment['HCCL_IF_BASE_PORT']}, but in use: {numbers}",
            "HCCL takes 16 ports from there on; error EJ0003 follows (hiyouga/LLaMA-Factory issue 9330).",
            "unset HCCL_IF_BASE_PORT (llava-npu chooses one for each job)",
        )


def launch_blocking(machine: Machine) -> Iterator[Finding]:
    for name in ("ASCEND_LAUNCH_BLOCKING", "CUDA_LAUNCH_BLOCKING"):
        if machine.environment.get(name, "0") not in ("", "0"):
            yield warning(
                "speed",
                f"{name}={machine.environment[name]}",
                "Every operation waits for the one before it: for finding faults only, and many times slower.",
                f"unset {name}",
            )

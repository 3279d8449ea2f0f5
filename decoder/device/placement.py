"""A process's device, precision and cores."""

import torch


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype | str:
    """The precision of served weights.

    "auto" is the stored precision, but float32 on a CPU, where greedy answers are then exact.
    """
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    return torch.float32 if device.type == "cpu" else "auto"


def spread_over_cores(threads: int) -> None:
    """Lets the operations of this thread, and of threads started later, use `threads` cores.

    0 keeps torch's default. Only one thread of a process should call it: OpenMP keeps a team of
    workers for each calling thread, and teams that outnumber the cores suspend each other at every
    operation, which doubles the time of a small forward.
    """
    if threads:
        torch.set_num_threads(threads)


def stay_on_one_core() -> None:
    """For every thread except the engine's: see `spread_over_cores`."""
    torch.set_num_threads(1)


def prefill_tokens(device: torch.device) -> int:
    """Prompt tokens that take about as long as a few decoding steps.

    Running streams wait for them.
    """
    return 256 if device.type == "cpu" else 2048

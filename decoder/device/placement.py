"""Where a process computes: its device, its precision, its cores."""

import torch


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype | str:
    """The precision of served weights. "auto": as stored, but float32 on a CPU, where greedy answers are exact."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    return torch.float32 if device.type == "cpu" else "auto"


def spread_over_cores(threads: int) -> None:
    """Lets this thread's operations use `threads` cores (0: torch's default), and those of threads to come as well.

    One thread of a process only: OpenMP keeps a team of workers for each thread that asks for one, and teams that are
    more than the cores put each other to sleep at every operation, which doubles the time of a small forward.
    """
    if threads:
        torch.set_num_threads(threads)


def stay_on_one_core() -> None:
    """For every thread but the engine's: see `spread_over_cores`."""
    torch.set_num_threads(1)


def prefill_tokens(device: torch.device) -> int:
    """Prompt tokens that take about as long as a few decoding steps: running streams wait for them."""
    return 256 if device.type == "cpu" else 2048

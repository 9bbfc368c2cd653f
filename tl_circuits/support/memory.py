"""Find out how much memory a device has left."""

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Free memory of ``device`` in bytes; the machine's own if the device cannot say."""
    if device.type == "cuda":
        # What torch keeps for later, it can use again.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    machine = psutil.virtual_memory().available
    if device.type == "cpu":
        return machine
    try:
        if device.type == "mps":  # shares the machine's memory, up to what the system recommends
            left = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
            return max(0, min(machine, left))
        return getattr(torch, device.type).mem_get_info(device)[0]
    except (AttributeError, AssertionError, RuntimeError):  # no such function, or a build or driver without it
        return machine

"""Memory that was freed, given back to the system."""

import ctypes


def return_freed_memory() -> None:
    """Give the system back what lies free inside this process, where the allocator can do that (glibc); else nothing.

    Temporaries of some megabytes leave holes among the small things that stay, which an allocator keeps for later: over
    a hundred megabytes each after a trace and while a model of two gigabytes is quantized layer by layer.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)

"""Pages of a tensor that are in memory, told by the kernel: an independent look at what was let go."""


def resident_pages(tensor):
    """Pages of a tensor that are in memory now, by what the kernel says of each address."""
    size = 4096
    first, last = tensor.data_ptr() // size, -(-(tensor.data_ptr() + tensor.nbytes) // size)
    with open("/proc/self/pagemap", "rb") as table:
        table.seek(8 * first)
        entries = table.read(8 * (last - first))
    return sum(entries[i + 7] >> 7 for i in range(0, len(entries), 8))

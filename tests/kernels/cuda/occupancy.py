"""How many blocks of a kernel a processor of an NVIDIA GPU holds at a time, from what the compiler says they take.

What limits.json of the CUDA and the Triton kernels bounds is this number, because registers and shared memory matter
for it alone, and in steps: with 256 threads a block, 65 and 80 registers a thread both leave room for three blocks.

How many a kernel needs follows from memory, which every kernel here waits for most of the time. A processor keeps its
share of the bandwidth busy when bandwidth times latency is on its way to it. With an assumed latency of .6 us that is

| | bandwidth, TB/s | processors | bytes |
|---|---|---|---|
| A100 (sm_80) | 2.0 | 108 | 11 KB |
| H200 (sm_90) | 4.8 | 132 | 22 KB |
| B200 (sm_100) | 8.0 | 148 | 32 KB |

Each limit says beside it, as "why", what a block has on its way. None of this was measured on a GPU.
"""

from dataclasses import dataclass

REGISTERS = 65536
THREADS = 2048
#: Shared memory of a processor, in bytes; the runtime takes 1 KiB of it for each block.
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


@dataclass(frozen=True)
class Usage:
    """What a block takes: threads, registers of one of them, and bytes of shared memory, without the runtime's own."""

    threads: int
    registers: int
    shared: int

    def blocks(self, capability: int) -> int:
        """
        >>> Usage(256, 65, 0).blocks(90), Usage(256, 80, 0).blocks(90), Usage(256, 81, 0).blocks(90)
        (3, 3, 2)
        >>> Usage(128, 16, 16384).blocks(80), Usage(128, 16, 16384).blocks(90)
        (9, 13)
        """
        warps = self.threads // 32
        # A warp gets registers in units of 256, and each quarter of a processor a quarter of them.
        warps_by_registers = REGISTERS // (-(-self.registers * 32 // 256) * 256) // 4 * 4
        shared = SHARED[capability] // (-(-(self.shared + 1024) // 128) * 128)
        return min(warps_by_registers // warps, THREADS // self.threads, 32, shared)

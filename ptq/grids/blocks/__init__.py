"""The block types of llama.cpp as grids, by llama.cpp's names."""

from ptq.grids.blocks.levels import Even, Ramp, Table
from ptq.grids.blocks.mins import MinsGrid
from ptq.grids.blocks.scaled import ScaledGrid
from ptq.grids.blocks.single import RampGrid, SingleGrid
from ptq.grids.blocks.vectors import VectorGrid
from ptq.grids.grid import BlockGrid

IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

BLOCK_GRIDS: dict[str, BlockGrid] = {
    grid.name: grid
    for grid in (
        SingleGrid("Q1_0", 128, Table((-1, 1))),
        SingleGrid("TQ1_0", 256, Even(3, 1)),
        SingleGrid("TQ2_0", 256, Even(4, 1)),  # named for three values, but its two bits hold and decode a fourth
        SingleGrid("Q2_0", 64, Even(4, 1)),
        SingleGrid("Q4_0", 32, Even(16, 8)),
        SingleGrid("Q5_0", 32, Even(32, 16)),
        SingleGrid("Q8_0", 32, Even(256, 128)),
        SingleGrid("IQ4_NL", 32, Table(IQ4_TABLE)),
        RampGrid("Q4_1", 32, Ramp(16)),
        RampGrid("Q5_1", 32, Ramp(32)),
        MinsGrid("Q2_K", 16, 15, Ramp(4)),
        MinsGrid("Q4_K", 32, 63, Ramp(16)),
        MinsGrid("Q5_K", 32, 63, Ramp(32)),
        ScaledGrid("Q3_K", 16, 32, Even(8, 4)),
        ScaledGrid("Q6_K", 16, 128, Even(64, 32)),
        ScaledGrid("IQ4_XS", 32, 32, Table(IQ4_TABLE)),
        VectorGrid("IQ2_XXS", 32, 1 / 8),
        VectorGrid("IQ2_XS", 16, 1 / 8),
        VectorGrid("IQ2_S", 16, 1 / 8),
        VectorGrid("IQ3_XXS", 32, 1 / 4),
        VectorGrid("IQ3_S", 32, 1.0),
    )
}

"""Pure mathematics: noise levels, gradients of losses, moves, presets, regions."""

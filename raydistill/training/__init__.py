"""One training run: data, distillation step, losses, loop, validation and saved state. Read `run` first."""

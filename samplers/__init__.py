"""Pure samplers: functions and keys in, samples out. They know `core`, never models or objectives."""

from esscher.samplers import guidance, steppers
from esscher.samplers.integration import integrate

__all__ = ["guidance", "integrate", "steppers"]

"""What kernels in Gluon share."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Under one name: Triton 3.7 has another for it than 3.6.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def following(i, phase, COUNT: gl.constexpr):
    """The next of COUNT buffers in turn, and the phase its barriers are in.

    Carried along: of a remainder of the step's number the compiler makes more registers.
    """
    last = i == COUNT - 1
    return gl.where(last, 0, i + 1), gl.where(last, phase ^ 1, phase)

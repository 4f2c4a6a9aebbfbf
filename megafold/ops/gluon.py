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


@gluon.jit
def as_held(x):
    """The numbers of an accumulator ``[rows, columns]`` so that what a thread holds lies together.

    By eight columns, warps of 16 rows and threads, each with two rows and two columns: so
    a warp reads and writes whole lines, 16 bytes a thread.
    """
    TILE: gl.constexpr = x.shape[0]
    WIDTH: gl.constexpr = x.shape[1]
    x = gl.reshape(x, (TILE // 16, 2, 8, WIDTH // 8, 4, 2))
    return gl.reshape(gl.permute(x, (3, 0, 2, 4, 1, 5)), (TILE * WIDTH,))


@gluon.jit
def as_tile(x, TILE: gl.constexpr, WIDTH: gl.constexpr):
    """What :func:`as_held` has put in order, as a tile again."""
    x = gl.reshape(x, (WIDTH // 8, TILE // 16, 8, 4, 2, 2))
    return gl.reshape(gl.permute(x, (1, 4, 2, 0, 3, 5)), (TILE, WIDTH))


@gluon.jit
def halves(pair):
    """Gate and value of a block, of what one product gave."""
    rows: gl.constexpr = pair.shape[0]
    units: gl.constexpr = pair.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(pair, (rows, 2, units)), (0, 2, 1)))


@gluon.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))`` by the two instructions that approximate; -log2 e is 0fBFB8AA3B."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .f32 t;
        mul.ftz.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.ftz.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }
        """,
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


# From the lane whose row, of eight, differs in one bit.
OTHER_0 = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 4, 31, -1;")
OTHER_1 = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 8, 31, -1;")
OTHER_2 = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 16, 31, -1;")


@gluon.jit
def _halved(x, BIT: gl.constexpr, OTHER: gl.constexpr):
    """Add up rows of ``[4, 8, n]`` that differ in one bit; each keeps half of the columns.

    So every step has half as much to exchange as that before.
    """
    n: gl.constexpr = x.shape[2] // 2
    low, high = gl.split(gl.permute(gl.reshape(x, (4, 8, 2, n)), (0, 1, 3, 2)))
    ROW: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, low.type.layout))
    upper = (((gl.arange(0, 8, ROW) >> BIT) & 1) != 0)[None, :, None]
    given = gl.where(upper, low, high)
    taken = gl.inline_asm_elementwise(OTHER, "=f,f", [given], gl.float32, is_pure=False, pack=1)
    return gl.where(upper, high, low) + taken


@gluon.jit
def warp_sums(x):
    """Sums of ``[64, 128]``, an accumulator's layout, over a warp's rows: ``[4, 8, 16]``.

    Row i of a warp has 16 columns from that on which :func:`store_sums` says.
    """
    x = gl.sum(gl.reshape(x, (4, 2, 8, 128)), 1)  # a thread's own
    return _halved(_halved(_halved(x, 0, OTHER_0), 1, OTHER_1), 2, OTHER_2)


@gluon.jit
def store_sums(p, t, x):
    """Store what the four warps of a group have summed, added up, by way of a tile."""
    COLUMNS: gl.constexpr = gl.BlockedLayout([4, 1, 1], [1, 2, 16], [1, 4, 1], [2, 1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    t_x = t._reinterpret(gl.float32, [4, 8, 16], PLAIN)
    barrier()
    t_x.store(x)
    barrier()
    total = gl.sum(t_x.load(COLUMNS), 0)
    OWN: gl.constexpr = gl.SliceLayout(0, COLUMNS)
    i = gl.arange(0, 8, gl.SliceLayout(1, OWN))
    begin = (i & 1) * 64 + ((i >> 1) & 1) * 32 + (i >> 2) * 16
    gl.store(p + begin[:, None] + gl.arange(0, 16, gl.SliceLayout(0, OWN))[None, :], total)

"""Writes LLVM functions for Numba code: values with operators, loads, loops, shuffles.

This runs while Numba compiles. Each operator and each function below appends LLVM instructions to
the function that is being written. With an address x, a number of bytes and 16 factors,

    with loop(nbytes, 64) as i:
        store(load(F32x16, x + i) * factors, x + i)

writes a loop that multiplies 16 float32 numbers at a time. Knows nothing of attention.

    python -m pytest kernels/test_kernels.py -k "tile or bandwidth"
"""
from contextlib import contextmanager

from llvmlite import binding, ir
from numba.core import cgutils, config

F16, F32 = ir.HalfType(), ir.FloatType()
I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32x16, I16x16, I32x16 = (ir.VectorType(kind, 16) for kind in (F32, I16, I32))
I16x32 = ir.VectorType(I16, 32)


class Value:
    """A value in the LLVM function being written. Its operators append instructions.

    A number on the right becomes a constant of the type on the left.
    """

    def __init__(self, builder, value):
        self.builder, self.value, self.type = builder, value, value.type

    def emit(self, instruction, *operands, **options):
        """Append an instruction of llvmlite's IRBuilder; this value is its first operand."""
        append = getattr(self.builder, instruction)
        return Value(self.builder, append(self.value, *map(raw, operands), **options))

    def constant(self, number, kind):
        number = [number] * kind.count if isinstance(kind, ir.VectorType) else number
        return Value(self.builder, ir.Constant(kind, number))

    def _operator(of_ints, of_floats=None):
        def append(x, y):
            y = y if isinstance(y, Value) else x.constant(y, x.type)
            is_float = getattr(x.type, "element", x.type) == F32
            return x.emit(of_floats if is_float else of_ints, y)
        return append

    __add__ = _operator("add", "fadd")
    __sub__ = _operator("sub", "fsub")
    __mul__ = _operator("mul", "fmul")
    __and__ = _operator("and_")
    __lshift__ = _operator("shl")
    __rshift__ = _operator("lshr")


def raw(x):
    """What llvmlite takes for x."""
    return x.value if isinstance(x, Value) else x


def variable(value):
    """A place on the stack that holds this value first. LLVM turns it into a register."""
    place = Value(value.builder, cgutils.alloca_once(value.builder, value.type))
    value.emit("store", place)
    return place


def load(kind, address):
    return address.emit("inttoptr", kind.as_pointer()).emit("load", align=2)


def store(value, address):
    value.emit("store", address.emit("inttoptr", value.type.as_pointer()), align=2)


def address(base, *offsets):
    for offset in offsets:
        base = base + offset
    return base


def shuffle(x, y, lanes):
    """Lane i = lane lanes[i] of x followed by y."""
    return x.emit("shuffle_vector", y, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def splat(x, lanes=16):
    """A number in all lanes."""
    v = Value(x.builder, ir.Constant(ir.VectorType(x.type, lanes), ir.Undefined))
    v = v.emit("insert_element", x, I32(0))
    return shuffle(v, v, [0] * lanes)


def call(name, *args, result=None):
    """Call an LLVM intrinsic. The result has the type of the first argument by default."""
    builder, args = args[0].builder, [raw(x) for x in args]
    kind = ir.FunctionType(result or args[0].type, [x.type for x in args])
    fn = cgutils.get_or_insert_function(builder.module, kind, name)
    return Value(builder, builder.call(fn, args))


def prefetch(address):
    """Into L2. In L1 it would push out lines that are still in use (measured: a third slower)."""
    pointer = address.emit("inttoptr", ir.IntType(8).as_pointer())
    call("llvm.prefetch.p0", pointer, I32(0), I32(2), I32(1), result=ir.VoidType())


def equal(x, y):
    return Value(x.builder, x.builder.icmp_signed("==", x.value, raw(y)))


def larger(x, y):
    x_wins = Value(x.builder, x.builder.fcmp_ordered(">", x.value, y.value))
    return x_wins.emit("select", x, y)


def fold(op, x, T=1):
    """Lane i = op over the lanes i, i + T, i + 2T, ... (modulo their number) of x."""
    lanes = x.type.count
    for k in (8, 4, 2, 1):
        if T <= k < lanes:
            x = op(x, shuffle(x, x, [(i + k) % lanes for i in range(lanes)]))
    return x


def lane_sums(vectors):
    """As many vectors as lanes -> one; lane i is the sum over vectors[i]. Each step halves their
    number."""
    lanes = len(vectors)
    for k in (lanes >> i for i in range(1, lanes.bit_length())):
        own = [lane + lanes * bool(lane & k) for lane in range(lanes)]
        other = [lane ^ k for lane in own]
        vectors = [shuffle(x, y, own) + shuffle(x, y, other)
                   for x, y in zip(vectors[:k], vectors[k:], strict=True)]
    return vectors[0]


@contextmanager
def loop(end, step=1, start=None):
    """The code within is repeated for i in range(start, end, step)."""
    start = I64(0) if start is None else start.value
    with cgutils.for_range_slice(end.builder, start, end.value, I64(step), I64) as (i, _):
        yield Value(end.builder, i)


def call_function(builder, write, args, *fixed):
    """Call an LLVM function that write(*fixed, *args) fills, once in a module for all that is
    fixed."""
    fn = _function(builder.module, write, [x.type for x in args], *fixed)
    builder.call(fn, args)


def _function(module, write, kinds, *fixed):
    name = "_".join(map(str, ("neo", write.__name__, *fixed)))
    fn = cgutils.get_or_insert_function(module, ir.FunctionType(ir.VoidType(), kinds), name)
    if not fn.blocks:
        fn.linkage = "internal"
        fn.attributes.add("noinline")
        inside = ir.IRBuilder(fn.append_basic_block())
        write(*fixed, *[Value(inside, x) for x in fn.args])
        inside.ret_void()
    return fn


# ---- what a processor makes of it

def target_features():
    """The features that Numba compiles for, as LLVM writes them: "+avx2,-avx512f,..."."""
    if config.CPU_FEATURES is not None:
        return config.CPU_FEATURES
    return binding.get_host_cpu_features().flatten()


def target_machine(triple=None, cpu=None):
    """A processor by its names in LLVM; by default the one that Numba compiles for."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    if triple:
        return binding.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    return binding.Target.from_default_triple().create_target_machine(
        cpu=config.CPU_NAME or binding.get_host_cpu_name(), features=target_features(), opt=3)


def assembly(machine, write, kinds, *fixed):
    """The machine code, as text, of the function that write(*fixed, *args) fills. kinds: LLVM types
    of args."""
    module = ir.Module()
    module.triple = machine.triple
    fn = _function(module, write, kinds, *fixed)
    fn.linkage = "external"
    made = binding.parse_assembly(str(module))
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(3))
    passes.getModulePassManager().run(made, passes)
    return machine.emit_assembly(made)

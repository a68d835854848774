"""Random calls of the C API: `python tests/kernels/fuzz.py --rounds 200 --seed 1`. Every call must end in a status, never a crash.

Each round takes a valid call of a function and spoils it in up to three places: a null, another dtype, rank, size or stride, data
shared with another argument or misaligned, an index out of range, a parameter of any value, no workspace. Buffers are exactly as
large as their shape and strides say, so that AddressSanitizer sees one element too many. The functions and their arguments are read
from the headers: one that has no valid call here is an error.

Needs numpy alone. The library is that of the installed package, or ENGINEPOST_FUZZ_LIBRARY.
"""

import argparse
import ctypes
import os
import pathlib
import re
import sys

import numpy as np
from fuzz_calls import CALLS, DTYPES, NO_TENSORS, WORKSPACE_OF, Buffer

HEADERS = pathlib.Path(__file__).parents[2] / "csrc" / "include" / "enginepost"


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


SCALARS = {
    "double": ctypes.c_double, "float": ctypes.c_float, "int": ctypes.c_int, "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64, "int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32,
}  # fmt: skip


def declarations():
    """({function: [(type, name)]}, {struct: ctypes class}) of the headers."""
    text = "\n".join(p.read_text() for p in sorted(HEADERS.glob("*.h")) if p.name != "dlpack.h")
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    structs = {}
    for body, name in re.findall(r"typedef struct\s*\w*\s*\{(.*?)\}\s*(ep_\w+);", text, re.S):
        fields = []
        for declaration in body.split(";")[:-1]:
            kind, names = declaration.replace("const ", "").split(None, 1)
            fields += [(n.strip(" *"), ctypes.c_void_p if "*" in n else SCALARS[kind]) for n in names.split(",")]
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    functions = {}
    for kind, name, arguments in re.findall(r"EP_EXPORT\s+(.*?)(ep_\w+)\((.*?)\);", text, re.S):
        split = [] if arguments.strip() == "void" else [" ".join(a.split()) for a in arguments.split(",")]
        functions[name] = (kind.strip(), [(a.rsplit(" ", 1)[0] if "*" not in a else a[: a.rindex("*") + 1],
                                           re.search(r"\w+$", a).group()) for a in split])  # fmt: skip
    return functions, structs


def tensor_of(array, memory):
    count = len(array.shape)
    shape = (ctypes.c_int64 * max(count, 1))(*array.shape)
    strides = None if array.strides is None else (ctypes.c_int64 * max(count, 1))(*array.strides)
    memory += [shape, strides]
    code, bits = DTYPES[array.dtype]
    at = ctypes.addressof(array.buffer) + array.base
    return DLTensor(
        None if array.null_data else at, array.device, 0, count, code, bits, array.lanes,
        None if array.null_shape else ctypes.addressof(shape), None if strides is None else ctypes.addressof(strides), array.shift,
    )  # fmt: skip


def allocate(arrays):
    """Every array gets a buffer of its own from malloc, exactly as long as it says, but for those that share another's."""
    for array in arrays:
        if array.share is None:
            others = [a.nbytes() for a in arrays if a.share is array]
            nbytes = max([array.nbytes(), *others])
            if nbytes > 1 << 26:
                return False
            array.buffer = (ctypes.c_char * nbytes)()  # beyond a few hundred bytes ctypes asks malloc
            ctypes.memmove(array.buffer, array.fill(nbytes), nbytes)
    for array in arrays:
        if array.share is not None:
            array.buffer = array.share.buffer
        # with a negative stride the first element is the last in memory
        strides = array.strides or array.packed()
        back = sum((n - 1) * -s for n, s in zip(array.shape, strides, strict=True) if s < 0 < n)
        array.base = back * (DTYPES[array.dtype][1] // 8)
    return True


# ---- what goes wrong ---------------------------------------------------------------------------------------------------------

WILD_FLOATS = [0.0, -1.0, 1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")]
WILD_INTS = [0, -1, 1, 2, 7, 255, 2**31 - 1, -(2**31)]
WILD_SIZES = [0, 1, 2, 3, 257, -1, 2**31, 2**62, -(2**63)]


def spoil(rng, tensors, scalars, nulls):
    name = str(rng.choice(sorted(tensors)))
    array = tensors[name]
    axis = int(rng.integers(len(array.shape))) if array.shape else 0
    kind = int(rng.integers(14))
    if kind == 0:
        nulls.add(name)
    elif kind == 1:
        array.dtype = str(rng.choice(sorted(DTYPES)))
    elif kind == 2 and array.shape:
        array.shape[axis] = int(rng.choice([0, 1, 2, 3, 17, array.shape[axis] + 1, max(array.shape[axis] - 1, 0)]))
    elif kind == 3 and array.shape:
        array.shape[axis] = WILD_SIZES[rng.integers(len(WILD_SIZES))]
        array.null_data = array.null_data or abs(array.shape[axis]) > 1000
    elif kind == 4:
        array.shape = list(array.shape[:-1]) if rng.integers(2) else [*array.shape, 1]
        array.strides = None
    elif kind in (5, 6) and array.shape:
        strides = array.packed()
        strides[axis] = int(rng.choice([0, 1, 2, strides[axis] + 3, 2 * strides[axis], -1]))
        array.strides = strides
    elif kind == 7:
        array.shift = int(rng.choice([1, 2, 4, 8]))
    elif kind in (8, 9):
        other = tensors[str(rng.choice(sorted(tensors)))]
        if other is not array and other.share is None and not any(t.share is array for t in tensors.values()):
            array.share = other
    elif kind == 10 and array.values is not None:
        array.values = [int(x) for x in rng.choice([-101, -100, -1, 0, 1, 5, 1000, 2**31 - 1], len(array.values))]
    elif kind == 11:
        array.device, array.lanes = [(2, 1), (1, 2), (1, 0), (99, 1)][rng.integers(4)]
    elif kind == 12:
        setattr(array, str(rng.choice(["null_data", "null_shape"])), True)
    elif kind == 13 and scalars:
        key, place = str(rng.choice(sorted(scalars))), scalars
        if isinstance(place[key], list):  # an array of structs
            place, key = place[key], int(rng.integers(len(place[key])))
        if isinstance(place[key], dict):
            place, key = (
                place[key],
                str(rng.choice(sorted(k for k, v in place[key].items() if isinstance(v, (int, float))))),
            )
        if isinstance(place[key], Buffer):
            nulls.add(key)
        elif key == "count":  # of an array of pointers, whose length nobody can check
            place[key] = int(rng.choice([-1, 0, 1, 65, -(2**31)])) if rng.integers(4) else place[key]
        else:
            wild = WILD_FLOATS if isinstance(place[key], float) else WILD_INTS + WILD_SIZES
            place[key] = wild[rng.integers(len(wild))]


def kind_of(structure, field):
    return next(kind for name, kind in structure._fields_ if name == field)


def call(library, functions, function, structs, rng, spoils):
    """The status of one call of `function`, spoilt in `spoils` places; None when it was not worth making."""
    arguments = functions[function][1]
    tensors, scalars, workspace_of = CALLS[function](rng)
    nulls = set()
    for _ in range(spoils):
        spoil(rng, tensors, scalars, nulls)
    if not allocate(list(tensors.values())):
        return None
    memory, values = [], []
    pointers = {}  # of the tensors that are not null
    for name, array in tensors.items():
        structure = tensor_of(array, memory)
        memory.append(structure)
        if name not in nulls:
            pointers[name] = ctypes.addressof(structure)

    def filled(kind, fields):
        numbers = {n: v for n, v in fields.items() if isinstance(v, (int, float))}
        wanted = {n: v or n for n, v in fields.items() if n not in numbers}
        numbers = {n: ctypes.c_int64(v).value if kind_of(kind, n) is not ctypes.c_double and isinstance(v, int) else v
                   for n, v in numbers.items()}  # fmt: skip
        return kind(**numbers, **{n: pointers.get(of) for n, of in wanted.items()})

    for kind, name in arguments:
        if kind == "const DLTensor *const *":
            row = [pointers.get(f"x{i}") for i in range(sum(re.fullmatch(r"x\d+", n) is not None for n in tensors))]
            memory.append((ctypes.c_void_p * len(row))(*row))
            values.append(ctypes.c_void_p(ctypes.addressof(memory[-1])))
        elif kind == "const DLTensor *":
            values.append(ctypes.c_void_p(pointers.get(name)))
        elif kind == "ep_merge_select *":
            memory.append((structs["ep_merge_select"] * len(scalars[name]))(
                *[filled(structs["ep_merge_select"], fields) for fields in scalars[name]]
            ))  # fmt: skip
            values.append(None if name in nulls else ctypes.byref(memory[-1]))
        elif isinstance(scalars.get(name), Buffer):
            memory.append(scalars[name])
            values.append(None if name in nulls else ctypes.byref(scalars[name].array))
        elif name == "workspace":
            wanted = workspace_of(tensors)
            query = getattr(library, f"{WORKSPACE_OF.get(function, function)}_workspace_bytes")
            possible = wanted is not None and all(0 <= n < 1 << 20 for n in wanted)  # else nobody has such tensors
            nbytes = query(*wanted) if possible else 0
            assert 0 <= nbytes < 1 << 28, (function, wanted, nbytes)
            block = (ctypes.c_char * (nbytes + 64))()
            at = (ctypes.addressof(block) + 63) // 64 * 64
            memory.append(block)
            broken = (
                int(rng.integers(20)) if spoils else 2
            )  # sometimes missing or off its alignment, which must be refused
            values.append(ctypes.c_void_p(None if broken == 0 else at + 4 if broken == 1 and nbytes else at))
        elif name == "stream":
            values.append(None)
        elif kind in structs:
            values.append(filled(structs[kind], scalars[name]))
        else:
            values.append(SCALARS[kind](scalars[name]))
    query = f"{function}_workspace_bytes_for"  # takes some of the same arguments, however bad
    if query in functions:
        by_name = {name: value for (_, name), value in zip(arguments, values, strict=True)}
        assert getattr(library, query)(*[by_name[name] for _, name in functions[query][1]]) >= 0
    status = getattr(library, function)(*values)
    if status not in (0, 1, 2, 3):
        raise AssertionError(f"{function} returned {status}")
    if status and function.removeprefix("ep_") not in library.ep_last_error().decode():
        raise AssertionError(f"{function} failed with the message {library.ep_last_error()!r}")
    return status


def library_path():
    path = os.environ.get("ENGINEPOST_FUZZ_LIBRARY")
    if path:
        return path
    import enginepost._core  # noqa: F401 (loads it)

    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if line.rstrip().endswith("/libenginepost.so"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="calls of each function")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one function")
    options = parser.parse_args()
    library = ctypes.CDLL(library_path())
    library.ep_last_error.restype = ctypes.c_char_p
    functions, structs = declarations()
    queries = {f for f in functions if f.endswith("_workspace_bytes")}
    for query in queries:
        getattr(library, query).restype = ctypes.c_int64
        getattr(library, query).argtypes = [ctypes.c_int64] * len(functions[query][1])
    for query in (f for f in functions if f.endswith("_workspace_bytes_for")):
        getattr(library, query).restype = ctypes.c_int64
        queries.add(query)
    missing = set(functions) - queries - NO_TENSORS - set(CALLS)
    if missing:
        sys.exit(f"no valid call is known of {', '.join(sorted(missing))}: add it to CALLS in fuzz_calls.py")
    for function in [options.only] if options.only else sorted(CALLS):
        counts = {0: 0, 1: 0, 2: 0, 3: 0}
        for i in range(options.rounds):
            if sys.stderr.isatty() or i % 50 == 0:  # the last line of a crash
                print(f"\r{function} seed {options.seed} round {i}", end="", file=sys.stderr, flush=True)
            rng = np.random.default_rng([options.seed, i])
            status = call(library, functions, function, structs, rng, 0 if i < 5 else int(rng.integers(1, 4)))
            if status is not None:
                counts[status] += 1
            if i < 5 and status != 0:
                sys.exit(f"\n{function}: the valid call {i} was refused: {library.ep_last_error().decode()}")
        print(f"\r{function}: {counts[0]} done, {counts[1]} refused, {counts[2] + counts[3]} unsupported" + 20 * " ")


if __name__ == "__main__":
    main()

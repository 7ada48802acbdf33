# What driver.c does, in a Python process: decodes what it is told to, with a libllama that is part of
# a Python extension (xllamacpp has all of llama.cpp in one library, and exports its API).
#
# Usage: python3 driver.py EXTENSION.so MODEL.gguf
#
# Commands, answers and errors are those of driver.c, and so is the number of threads. The extension is
# opened as a library, but not imported: that would need the packages that its Python part imports, and
# the version of Python that it was built for. That llama.cpp's structs can be passed without knowing their
# members is explained in driver.c, too.

import ctypes
import os
import platform
import sys

N_THREADS = 2


class ByValue(ctypes.Structure):
    """Any of llama.cpp's structs that are passed by value."""

    _fields_ = [("words", ctypes.c_uint64 * 128)]


POINTER = ctypes.c_void_p
INT = ctypes.c_int32
FUNCTIONS = {
    "llama_backend_init": (None, []),
    "llama_backend_free": (None, []),
    "llama_model_default_params": (ByValue, []),
    "llama_context_default_params": (ByValue, []),
    "llama_model_load_from_file": (POINTER, [ctypes.c_char_p, ByValue]),
    "llama_init_from_model": (POINTER, [POINTER, ByValue]),
    "llama_set_n_threads": (None, [POINTER, INT, INT]),
    "llama_batch_get_one": (ByValue, [ctypes.POINTER(INT), INT]),
    "llama_decode": (INT, [POINTER, ByValue]),
    "llama_free": (None, [POINTER]),
    "llama_model_free": (None, [POINTER]),
}


class Failure(Exception):
    """Something that the user is told, without a traceback."""


def open_lazily(path):
    """Has functions looked up only when they are called, which no function of Python is: another version
    may lack some. ctypes itself opens libraries with RTLD_NOW."""
    libdl = ctypes.CDLL(None)
    libdl.dlopen.restype = POINTER
    libdl.dlopen.argtypes = [ctypes.c_char_p, ctypes.c_int]
    libdl.dlerror.restype = ctypes.c_char_p
    handle = libdl.dlopen(path.encode(), os.RTLD_LAZY)
    if handle is None:
        error = libdl.dlerror().decode()
        version = platform.python_version()
        raise Failure(f"{error}: this is Python {version}; the extension may need a newer one")
    return handle


def functions(path):
    """llama.cpp's functions in the extension."""
    library = ctypes.CDLL(path, handle=open_lazily(path))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


def tokens(line):
    command, *words = line.split() or [""]
    if command != "decode":
        raise Failure(f"{command}: not a command")
    numbers = [int(word) for word in words]
    if not numbers:
        raise Failure("decode: no token")
    return (INT * len(numbers))(*numbers)


def serve(llama, context):
    print("ready", flush=True)
    for line in sys.stdin:
        batch = tokens(line)
        if llama.llama_decode(context, llama.llama_batch_get_one(batch, len(batch))) != 0:
            raise Failure("decode: llama_decode failed")
        print("done", flush=True)


def main(extension, model_path):
    llama = functions(extension)
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(
        model_path.encode(), llama.llama_model_default_params()
    )
    if model is None:
        raise Failure(f"{model_path}: not loaded")
    context = llama.llama_init_from_model(model, llama.llama_context_default_params())
    if context is None:
        raise Failure(f"{model_path}: no context")
    llama.llama_set_n_threads(context, N_THREADS, N_THREADS)
    serve(llama, context)
    llama.llama_free(context)
    llama.llama_model_free(model)
    llama.llama_backend_free()


try:
    main(*sys.argv[1:])
except (Failure, OSError, AttributeError, TypeError, ValueError) as error:
    sys.exit(f"driver.py: {error}")

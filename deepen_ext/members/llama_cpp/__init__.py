"""llama.cpp as a backend, in this process: its C API by ctypes, over the library that a package brings."""

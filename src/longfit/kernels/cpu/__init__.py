"""The C++ kernels, bound through a C ABI (``csrc/longfit.h``)."""

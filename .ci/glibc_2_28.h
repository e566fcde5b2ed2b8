// Read before each source of a release wheel (.ci/old_compiler): exp and pow of glibc 2.2.5, which a system of
// manylinux_2_28 has too. A newer glibc links their second versions, which differ in errno alone.
#if defined(__x86_64__) && !defined(__CUDA_ARCH__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver pow, pow@GLIBC_2.2.5");
#endif

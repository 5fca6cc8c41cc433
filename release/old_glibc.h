/* Included before the kernel in a release: the only symbols that tie it to a new C library, in the versions that every
 * Linux of the last ten years has. (glibc 2.34 moved those of threads from libpthread into libc and gave them new versions,
 * and 2.29 gave one to a pow that leaves the handling of errors to errno; its results are the same.) */
#if defined(__x86_64__)
#define OLD_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define OLD_GLIBC "GLIBC_2.17"
#endif
__asm__(".symver pow, pow@" OLD_GLIBC);
__asm__(".symver pthread_create, pthread_create@" OLD_GLIBC);
__asm__(".symver pthread_join, pthread_join@" OLD_GLIBC);

// What libstdc++, linked statically, asks of a newer glibc than wheels may (cmake/manylinux.cmake).

extern "C" unsigned long strtoul_of_any_glibc(const char*, char**, int) asm("strtoul");

extern "C" {
// Of glibc 2.32: whether the process has one thread alone. No is always right: it only makes the
// counts of std::shared_ptr atomic.
char __libc_single_threaded = 0;

// Of glibc 2.38, whose headers name it in place of strtoul: it also reads "0b1", as C23 has it.
unsigned long __isoc23_strtoul(const char* text, char** end, int base) {
  return strtoul_of_any_glibc(text, end, base);
}
}

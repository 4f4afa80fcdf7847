// libstdc++ asks glibc, from 2.32 on, whether the process has one thread alone. Wheels run on an
// older glibc too, so they answer for themselves: no, which is safe, for it only makes the counts
// of std::shared_ptr atomic.
extern "C" {
char __libc_single_threaded = 0;
}

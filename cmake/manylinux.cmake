# rnnkern_link_for_manylinux(TARGET) links for glibc 2.28, as the tag manylinux_2_28 promises, on a
# machine whose glibc is newer. The objects are those of any other build.
#
# - libstdc++ is linked statically, because the system's may be older than the compiler's. Nothing
#   but the module's entry point is exported, so it does not meet the one that torch uses. The
#   linker drops sections that nothing refers to, and with them what libstdc++ alone would want of
#   a new glibc. libgcc stays shared: one unwinder serves the whole process.
# - glibc 2.34 moved libpthread, libdl and librt into libc and gave their symbols new versions; the
#   old versions are still there, for programs that were linked before. The linker takes a symbol
#   from the first library that has it, so stubs of the old libraries, with the old versions, come
#   first. At run time the system's own libraries of these names stand in their place. They may not
#   be dropped as needless: the linker decides that before link-time optimisation asks for symbols.
# - csrc/newer_glibc.cpp defines what is left: symbols that glibc 2.28 does not have at all.
#
# A symbol that is too new all the same makes tools/check_wheel.py fail.

set(rnnkern_old_libpthread sem_destroy sem_init sem_post sem_timedwait sem_trywait sem_wait)
foreach(name
    condattr_setpshared create detach getspecific join key_create key_delete kill
    mutex_trylock mutexattr_destroy mutexattr_init mutexattr_setpshared mutexattr_settype once
    rwlock_destroy rwlock_init rwlock_rdlock rwlock_timedrdlock rwlock_timedwrlock
    rwlock_tryrdlock rwlock_trywrlock rwlock_unlock rwlock_wrlock rwlockattr_destroy
    rwlockattr_init rwlockattr_setpshared setspecific
    spin_destroy spin_init spin_lock spin_trylock spin_unlock)
  list(APPEND rnnkern_old_libpthread pthread_${name})
endforeach()
set(rnnkern_old_libdl dlclose dlerror dlmopen dlopen dlsym dlvsym)
set(rnnkern_old_librt shm_open shm_unlink)

# A library such as libdl.so.2 that only has symbols, the old versions of those in the list.
function(rnnkern_old_library name suffix)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/glibc-2.28)
  set(source)
  foreach(symbol IN LISTS rnnkern_old_lib${name})
    string(APPEND source "extern \"C\" void ${symbol}() {}\n")
  endforeach()
  file(GENERATE OUTPUT ${folder}/${name}.cpp CONTENT "${source}")
  file(GENERATE OUTPUT ${folder}/${name}.map
    CONTENT "GLIBC_2.2.5 { global: *; };\nGLIBC_2.3.4 { global: dlmopen; };\n")
  add_library(old_${name} SHARED ${folder}/${name}.cpp)
  target_link_options(old_${name} PRIVATE -nostdlib -Wl,--version-script=${folder}/${name}.map)
  set_target_properties(old_${name} PROPERTIES
    OUTPUT_NAME ${name} SUFFIX ${suffix} LIBRARY_OUTPUT_DIRECTORY ${folder}
    CXX_VISIBILITY_PRESET default)
endfunction()

function(rnnkern_link_for_manylinux target)
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    message(FATAL_ERROR "rnnkern: RNNKERN_MANYLINUX is for x86-64, got ${CMAKE_SYSTEM_PROCESSOR}")
  endif()
  rnnkern_old_library(pthread .so.0)
  rnnkern_old_library(dl .so.2)
  rnnkern_old_library(rt .so.1)
  target_sources(${target} PRIVATE csrc/newer_glibc.cpp)
  target_link_libraries(${target} PRIVATE old_pthread old_dl old_rt)
  target_link_options(${target} PRIVATE -static-libstdc++ -Wl,--gc-sections -Wl,--no-as-needed
    -Wl,--version-script=${CMAKE_CURRENT_SOURCE_DIR}/cmake/exports.map)
  # No path to the stubs, which are not there when the module is loaded.
  set_target_properties(${target} PROPERTIES BUILD_WITH_INSTALL_RPATH ON)
endfunction()

# Finds nvcc and enables the language CUDA: the compiler that CUDACXX names, that of CUDA_HOME, the
# one on the PATH, or one that pip installed (cuda-toolkit[nvcc,cudart,cccl]). Leaves
# CMAKE_CUDA_COMPILER empty where none works and RNNKERN_CUDA is AUTO.
cmake_policy(SET CMP0104 NEW)
set(rnnkern_oldest_nvcc 12.0)  # the first with C++20 and sm_90a

function(rnnkern_without_cuda reason)
  if(RNNKERN_CUDA STREQUAL "AUTO")
    message(NOTICE "rnnkern: ${reason}: building for the CPU alone")
  else()
    message(FATAL_ERROR "rnnkern: RNNKERN_CUDA is set, but ${reason}")
  endif()
  set(CMAKE_CUDA_COMPILER "" CACHE FILEPATH "" FORCE)
endfunction()

if(NOT CMAKE_CUDA_COMPILER)
  if(DEFINED ENV{CUDACXX})
    set(found $ENV{CUDACXX})
  else()
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
      OUTPUT_VARIABLE packages OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    file(GLOB from_pip ${packages}/nvidia/cu*/bin)
    find_program(found nvcc HINTS $ENV{CUDA_HOME}/bin NO_DEFAULT_PATH NO_CACHE)
    find_program(found nvcc NO_CACHE)
    find_program(found nvcc HINTS ${from_pip} NO_DEFAULT_PATH NO_CACHE)
  endif()
  if(NOT found)
    rnnkern_without_cuda("no nvcc was found (CUDACXX, CUDA_HOME, PATH, pip)")
    return()
  endif()
  set(CMAKE_CUDA_COMPILER ${found} CACHE FILEPATH "The CUDA compiler" FORCE)
endif()

if(NOT DEFINED ENV{CUDACXX})
  set(ENV{CUDACXX} ${CMAKE_CUDA_COMPILER})
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  rnnkern_without_cuda("$ENV{CUDACXX} does not work")
  return()
endif()

# Machine code for every generation from Ampere on, and PTX for what comes later. Set CUDAARCHS for
# others.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES 80 90a-real 100-real 120-real)
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS rnnkern_oldest_nvcc)
  rnnkern_without_cuda(
    "${CMAKE_CUDA_COMPILER} is ${CMAKE_CUDA_COMPILER_VERSION}, wanted ${rnnkern_oldest_nvcc} or later")
  return()
endif()
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  list(REMOVE_ITEM CMAKE_CUDA_ARCHITECTURES 100-real 120-real)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
find_package(CUDAToolkit REQUIRED)

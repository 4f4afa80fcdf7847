# Chooses the nvcc: the one that CUDACXX names, that of CUDA_HOME, the one on the PATH, or one that
# pip installed (cuda-toolkit[nvcc,cudart,cccl]); and the architectures that it compiles for. Sets
# rnnkern_nvcc_version if there is one. If there is none, that is an error; with RNNKERN_CUDA=AUTO
# it is a message, and so is a machine without a GPU, because the kernels take minutes to compile
# and nothing would run them. tests/test_cuda_setting.py runs this file alone.
set(rnnkern_nvcc_version)
set(rnnkern_oldest_nvcc 12.0)  # the first with C++20 and sm_90a

function(rnnkern_without_cuda reason)
  if(RNNKERN_CUDA STREQUAL "AUTO")
    message(NOTICE "rnnkern: ${reason}: building for the CPU alone")
  else()
    message(FATAL_ERROR "rnnkern: RNNKERN_CUDA is set, but ${reason}")
  endif()
endfunction()

if(DEFINED ENV{CUDACXX})
  set(rnnkern_nvcc $ENV{CUDACXX})
else()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
    OUTPUT_VARIABLE packages OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  file(GLOB from_pip ${packages}/nvidia/cu*/bin)
  if(DEFINED ENV{CUDA_HOME})
    find_program(rnnkern_nvcc nvcc PATHS $ENV{CUDA_HOME}/bin NO_DEFAULT_PATH NO_CACHE)
  endif()
  find_program(rnnkern_nvcc nvcc NO_CACHE)
  find_program(rnnkern_nvcc nvcc PATHS ${from_pip} NO_DEFAULT_PATH NO_CACHE)
  if(NOT rnnkern_nvcc)
    rnnkern_without_cuda("no nvcc was found (CUDACXX, CUDA_HOME, PATH, pip)")
    return()
  endif()
  set(ENV{CUDACXX} ${rnnkern_nvcc})
endif()

execute_process(COMMAND ${rnnkern_nvcc} --version
  OUTPUT_VARIABLE version ERROR_VARIABLE ignored RESULT_VARIABLE failed)
if(failed OR NOT version MATCHES "release ([0-9]+\\.[0-9]+)")
  rnnkern_without_cuda("${rnnkern_nvcc} does not run")
  return()
endif()
set(version ${CMAKE_MATCH_1})
if(version VERSION_LESS rnnkern_oldest_nvcc)
  rnnkern_without_cuda("${rnnkern_nvcc} is ${version}, wanted ${rnnkern_oldest_nvcc} or later")
  return()
endif()

# The architectures of this machine's GPUs, as CMake names them; those that the kernels run on.
function(rnnkern_architectures_here result)
  set(found)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE capabilities ERROR_VARIABLE ignored RESULT_VARIABLE failed)
  if(NOT failed)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${capabilities}")
    foreach(capability IN LISTS capabilities)
      if(capability VERSION_GREATER_EQUAL 8.0)
        string(REPLACE . "" number ${capability})
        list(APPEND found ${number}-real)
      endif()
    endforeach()
    list(TRANSFORM found REPLACE "^90-real$" 90a-real)
    list(REMOVE_DUPLICATES found)
  endif()
  set(${result} ${found} PARENT_SCOPE)
endfunction()

# AUTO takes the architectures of the GPUs here; ON takes every generation from Ampere on, and PTX
# for what comes later. CUDAARCHS names others.
if(RNNKERN_CUDA STREQUAL "AUTO")
  rnnkern_architectures_here(architectures)
  if(NOT architectures)
    rnnkern_without_cuda("nvcc ${version} is here, but no NVIDIA GPU of compute capability 8.0 \
or later that nvidia-smi knows (RNNKERN_CUDA=ON builds the CUDA kernels all the same)")
    return()
  endif()
else()
  set(architectures 80 90a-real)
  if(version VERSION_GREATER_EQUAL 12.8)
    list(APPEND architectures 100-real 120-real)
  endif()
endif()
if(NOT "$ENV{CUDAARCHS}" STREQUAL "")
  set(architectures $ENV{CUDAARCHS})
endif()
# Not only if it is undefined: CMake may have kept the value of the last build.
set(CMAKE_CUDA_ARCHITECTURES ${architectures})
set(rnnkern_nvcc_version ${version})

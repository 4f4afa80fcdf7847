# Enables the language CUDA with the compiler that choose_nvcc.cmake chooses. Sets rnnkern_has_cuda
# if it works.
set(rnnkern_has_cuda OFF)
include(${CMAKE_CURRENT_LIST_DIR}/choose_nvcc.cmake)
if(NOT rnnkern_nvcc_version)
  return()
endif()

# What nvcc calls the code for CMake's names of architectures: 80 is sm_80, machine code, and
# compute_80, PTX; 90a-real is sm_90a alone.
function(rnnkern_code_names result)
  set(names)
  foreach(architecture IN LISTS ARGN)
    if(architecture MATCHES "^(all|all-major|native)$")
      string(TOUPPER CMAKE_CUDA_ARCHITECTURES_${architecture} list)
      string(REPLACE - _ list ${list})
      rnnkern_code_names(several ${${list}})
      list(APPEND names ${several})
      continue()
    endif()
    string(REGEX REPLACE "-(real|virtual)$" "" number ${architecture})
    if(NOT architecture MATCHES "-virtual$")
      list(APPEND names sm_${number})
    endif()
    if(NOT architecture MATCHES "-real$")
      list(APPEND names compute_${number})
    endif()
  endforeach()
  set(${result} ${names} PARENT_SCOPE)
endfunction()

# pip's nvcc looks for its libraries in a folder lib64 that it does not have.
get_filename_component(rnnkern_toolkit ${rnnkern_nvcc} DIRECTORY)
get_filename_component(rnnkern_toolkit ${rnnkern_toolkit} DIRECTORY)
if(EXISTS ${rnnkern_toolkit}/lib/libcudart_static.a AND NOT EXISTS ${rnnkern_toolkit}/lib64)
  set(ENV{NVCC_APPEND_FLAGS} "-L${rnnkern_toolkit}/lib $ENV{NVCC_APPEND_FLAGS}")
endif()

include(CheckLanguage)
check_language(CUDA)  # with a host compiler that it accepts
if(NOT CMAKE_CUDA_COMPILER)
  rnnkern_without_cuda("${rnnkern_nvcc} does not work")
  return()
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # and it loads where there is no driver
set(rnnkern_has_cuda ON)

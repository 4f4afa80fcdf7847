# Sets rnnkern_instruction_sets: those among which the package chooses when it is loaded. With
# RNNKERN_INSTRUCTION_SETS=native it is only the one that this CPU and this system would choose,
# which takes a third of the time of all, or less; with baseline only the one that every CPU has.
if(NOT RNNKERN_INSTRUCTION_SETS MATCHES "^(all|native|baseline)$")
  message(FATAL_ERROR "rnnkern: RNNKERN_INSTRUCTION_SETS is '${RNNKERN_INSTRUCTION_SETS}', "
    "wanted all, native or baseline")
endif()

set(rnnkern_instruction_sets baseline)
if(RNNKERN_INSTRUCTION_SETS STREQUAL "baseline"
    OR NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  return()
endif()
if(RNNKERN_INSTRUCTION_SETS STREQUAL "all")
  list(APPEND rnnkern_instruction_sets x86_64_v3 x86_64_v4 x86_64_v4_vnni x86_64_v4_bf16
    x86_64_v4_amx)
  return()
endif()

# The compiler knows what this CPU has.
execute_process(COMMAND ${CMAKE_CXX_COMPILER} -march=native -dM -E -x c++ /dev/null
  OUTPUT_VARIABLE macros COMMAND_ERROR_IS_FATAL ANY)
function(rnnkern_has result)
  set(${result} ON PARENT_SCOPE)
  foreach(name IN LISTS ARGN)
    if(NOT macros MATCHES "#define __${name}__ 1")
      set(${result} OFF PARENT_SCOPE)
    endif()
  endforeach()
endfunction()
rnnkern_has(has_v3 AVX2 BMI BMI2 F16C FMA LZCNT MOVBE)
rnnkern_has(has_v4 AVX512F AVX512BW AVX512CD AVX512DQ AVX512VL)
rnnkern_has(has_vnni AVX512VNNI)
rnnkern_has(has_bf16 AVX512VNNI AVX512BF16)
rnnkern_has(has_amx AMX_TILE AMX_BF16 AMX_INT8)
if(RNNKERN_AMX_STAND_IN)
  set(has_amx ON)
elseif(has_bf16 AND has_amx)
  # A system may refuse the tiles to a process, or not know them. It is asked each time.
  unset(tiles_compiled CACHE)
  unset(tiles_refused CACHE)
  try_run(tiles_refused tiles_compiled ${CMAKE_BINARY_DIR}/tiles ${CMAKE_CURRENT_LIST_DIR}/tiles.cpp
    CMAKE_FLAGS -DINCLUDE_DIRECTORIES=${CMAKE_CURRENT_SOURCE_DIR}/csrc)
  if(NOT tiles_compiled OR tiles_refused)
    set(has_amx OFF)
  endif()
endif()
if(has_v3 AND has_v4 AND has_bf16 AND has_amx)
  set(rnnkern_instruction_sets x86_64_v4_amx)
elseif(has_v3 AND has_v4 AND has_bf16)
  set(rnnkern_instruction_sets x86_64_v4_bf16)
elseif(has_v3 AND has_v4 AND has_vnni)
  set(rnnkern_instruction_sets x86_64_v4_vnni)
elseif(has_v3 AND has_v4)
  set(rnnkern_instruction_sets x86_64_v4)
elseif(has_v3)
  set(rnnkern_instruction_sets x86_64_v3)
endif()

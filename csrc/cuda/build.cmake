# The CUDA half of cfengine._C. nvcc is called directly: CMake's own CUDA language wants to know a toolkit's default
# architectures, and an old CMake does not know a new toolkit.
#
# The runtime is linked statically, so the module loads on a machine without a driver. sm80.cu is built for 8.0, 8.9 and
# 12.0, with PTX of the first two for what is newer than this build (8.9 is the first with e4m3); sm90.cu for 9.0a alone:
# its instructions exist nowhere else.
find_program(CF_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(NOT CF_NVCC)
  message(STATUS "CUDA kernels are left out: nvcc was not found (put it on PATH, or set CUDA_HOME)")
  return()
endif()
execute_process(COMMAND ${CF_NVCC} --version OUTPUT_VARIABLE nvcc_says)
string(REGEX MATCH "release ([0-9.]+)" nvcc_release "${nvcc_says}")
set(nvcc_version ${CMAKE_MATCH_1})
if(NOT nvcc_version VERSION_GREATER_EQUAL 12.4)
  message(WARNING "CUDA kernels are left out: ${CF_NVCC} is version ${nvcc_version}, they need 12.4 or later")
  return()
endif()

get_filename_component(nvcc_folder ${CF_NVCC} REALPATH)
get_filename_component(nvcc_folder ${nvcc_folder} DIRECTORY)
find_library(CF_CUDART libcudart_static.a HINTS ${nvcc_folder}/.. PATHS /usr/local/cuda NO_DEFAULT_PATH
             PATH_SUFFIXES lib64 lib targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib targets/sbsa-linux/lib)
if(NOT CF_CUDART)
  message(WARNING "CUDA kernels are left out: libcudart_static.a was not found beside ${CF_NVCC}")
  return()
endif()

set(nvcc_flags -std=c++17 -O3 -ccbin ${CMAKE_CXX_COMPILER} -Xcompiler -fPIC,-fvisibility=hidden -I${CMAKE_SOURCE_DIR}/csrc)
file(WRITE ${CMAKE_BINARY_DIR}/probe.cu "#include <cuda_runtime.h>\n__global__ void probe(int* x) { *x = 1; }\n")
execute_process(COMMAND ${CF_NVCC} ${nvcc_flags} -c probe.cu -o probe.o WORKING_DIRECTORY ${CMAKE_BINARY_DIR}
                RESULT_VARIABLE probe_result ERROR_VARIABLE probe_error OUTPUT_QUIET)
if(probe_result)
  message(WARNING "CUDA kernels are left out: ${CF_NVCC} does not work with ${CMAKE_CXX_COMPILER}: ${probe_error}")
  return()
endif()

set(folder ${CMAKE_SOURCE_DIR}/kernels/paged_attention)
file(GLOB cuda_headers CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/*.h ${CMAKE_SOURCE_DIR}/csrc/cuda/*h
     ${folder}/*.h ${folder}/*.cuh)
set(sm80_targets 80 89)
if(nvcc_version VERSION_GREATER_EQUAL 12.8)
  list(APPEND sm80_targets 120)
endif()
set(sm90_targets "")
if(EXISTS ${folder}/sm90.cu)
  set(sm90_targets 90a)
endif()
string(REPLACE ";" " " architectures "${sm80_targets};${sm90_targets}")
string(STRIP "${architectures}" architectures)

# cf_cuda_object(<source> <target>...): compile one source for some targets into an object of _C.
function(cf_cuda_object source)
  foreach(target IN LISTS ARGN)
    list(APPEND generate -gencode=arch=compute_${target},code=sm_${target})
    if(target MATCHES "^8")
      list(APPEND generate -gencode=arch=compute_${target},code=compute_${target})
    endif()
  endforeach()
  get_filename_component(name ${source} NAME_WE)
  set(object ${CMAKE_BINARY_DIR}/${name}.cu.o)
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${CF_NVCC} ${nvcc_flags} -DCF_CUDA_ARCHITECTURES=\"${architectures}\" ${generate} --threads 2
            -c ${source} -o ${object}
    DEPENDS ${source} ${cuda_headers} VERBATIM)
  target_sources(_C PRIVATE ${object})
  set_source_files_properties(${object} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
endfunction()

cf_cuda_object(${folder}/turns.cu ${sm80_targets} ${sm90_targets})
cf_cuda_object(${folder}/sm80.cu ${sm80_targets})
if(sm90_targets)
  cf_cuda_object(${folder}/sm90.cu ${sm90_targets})
  target_compile_definitions(_C PRIVATE CF_HAS_SM90)
endif()
target_sources(_C PRIVATE ${folder}/cuda.cpp)
target_compile_definitions(_C PRIVATE CF_CUDA_ARCHITECTURES="${architectures}")
find_package(Threads REQUIRED)
target_link_libraries(_C PRIVATE ${CF_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
message(STATUS "CUDA kernels for ${architectures}, with ${CF_NVCC} ${nvcc_version}")

# The client library for a sample: an installed one, or, inside the source tree, the one beside the samples.
find_package(cfengine_client CONFIG QUIET)
if(NOT cfengine_client_FOUND)
  if(NOT EXISTS ${CMAKE_CURRENT_LIST_DIR}/../include/cfengine_client.h)
    message(FATAL_ERROR "cfengine_client was not found; install it (cmake --install of csrc/client) and give "
      "-DCMAKE_PREFIX_PATH=PREFIX, or build this sample inside the source tree")
  endif()
  add_subdirectory(${CMAKE_CURRENT_LIST_DIR}/.. ${CMAKE_BINARY_DIR}/client EXCLUDE_FROM_ALL)
endif()

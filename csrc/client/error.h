/* The sentence behind cf_last_error, and the check of versioned structures. */
#ifndef CF_ERROR_H
#define CF_ERROR_H

#include <stdbool.h>

#include "cfengine_client.h"

/* Keep a sentence for this thread and return `result`. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
cf_result cf_fail(cf_result result, const char* format, ...);

/* A structure is there, of this type, at least `least` bytes long, and asks for no extension. */
cf_result cf_check_struct(const void* structure, uint32_t type, uint32_t least, const char* name);

/* Text is UTF-8 without surrogates, overlong forms and zeros. */
bool cf_is_utf8(const char* text, uint32_t bytes);

/* A ring's name can be part of a file name on every system. */
bool cf_is_name(const char* name);

#endif

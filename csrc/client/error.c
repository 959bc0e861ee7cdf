/* Errors, and checks of what a caller passes. */
#define _POSIX_C_SOURCE 200809L /* strnlen */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char sentence[512];

cf_result cf_fail(cf_result result, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(sentence, sizeof sentence, format, arguments);
    va_end(arguments);
    return result;
}

const char* cf_last_error(void) { return sentence; }

const char* cf_result_name(cf_result result) {
    switch (result) {
        case CF_SUCCESS:
            return "CF_SUCCESS";
        case CF_NOT_READY:
            return "CF_NOT_READY";
        case CF_ERROR_INVALID_ARGUMENT:
            return "CF_ERROR_INVALID_ARGUMENT";
        case CF_ERROR_VERSION:
            return "CF_ERROR_VERSION";
        case CF_ERROR_NOT_FOUND:
            return "CF_ERROR_NOT_FOUND";
        case CF_ERROR_ACCESS:
            return "CF_ERROR_ACCESS";
        case CF_ERROR_BAD_RING:
            return "CF_ERROR_BAD_RING";
        case CF_ERROR_TOO_MANY_READERS:
            return "CF_ERROR_TOO_MANY_READERS";
        case CF_ERROR_FRAME_HELD:
            return "CF_ERROR_FRAME_HELD";
        case CF_ERROR_NOT_HELD:
            return "CF_ERROR_NOT_HELD";
        case CF_ERROR_LEASE_LOST:
            return "CF_ERROR_LEASE_LOST";
        case CF_ERROR_QUEUE_FULL:
            return "CF_ERROR_QUEUE_FULL";
        case CF_ERROR_TOO_LONG:
            return "CF_ERROR_TOO_LONG";
        case CF_ERROR_BUSY:
            return "CF_ERROR_BUSY";
        case CF_ERROR_OUT_OF_MEMORY:
            return "CF_ERROR_OUT_OF_MEMORY";
        case CF_ERROR_SYSTEM:
            return "CF_ERROR_SYSTEM";
        case CF_ERROR_MEMORY_KIND:
            return "CF_ERROR_MEMORY_KIND";
        case CF_ERROR_TIMEOUT:
            return "CF_ERROR_TIMEOUT";
        case CF_ERROR_UNSUPPORTED:
            return "CF_ERROR_UNSUPPORTED";
        default:
            return "CF_UNKNOWN";
    }
}

cf_result cf_check_struct(const void* structure, uint32_t type, uint32_t least, const char* name) {
    if (structure == NULL)
        return cf_fail(CF_ERROR_INVALID_ARGUMENT, "the pointer to %s is NULL; pass the address of one", name);
    const cf_header* header = structure;
    if (header->struct_type != type)
        return cf_fail(CF_ERROR_INVALID_ARGUMENT, "%s has struct_type %u but must have %u; begin with its _INIT macro",
                       name, header->struct_type, type);
    if (header->struct_size < least)
        return cf_fail(CF_ERROR_INVALID_ARGUMENT,
                       "%s has struct_size %u but at least %u is needed; begin with its _INIT macro", name,
                       header->struct_size, least);
    if (header->next != NULL)
        return cf_fail(CF_ERROR_INVALID_ARGUMENT, "%s has a `next`, but version 1 has no extensions; set it to NULL",
                       name);
    return CF_SUCCESS;
}

/* Length of the character that starts at `at`, or 0. */
static uint32_t utf8_character(const unsigned char* at, uint32_t left) {
    const unsigned char first = at[0];
    if (first == 0) return 0;
    if (first < 0x80) return 1;
    const uint32_t bytes = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    if (first < 0xc2 || first > 0xf4 || left < bytes) return 0;
    /* the second byte rules out overlong forms, surrogates and what lies beyond U+10FFFF */
    const unsigned char low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
    const unsigned char high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
    if (at[1] < low || at[1] > high) return 0;
    for (uint32_t i = 2; i < bytes; ++i)
        if ((at[i] & 0xc0) != 0x80) return 0;
    return bytes;
}

bool cf_is_utf8(const char* text, uint32_t bytes) {
    for (uint32_t at = 0; at < bytes;) {
        const uint32_t step = utf8_character((const unsigned char*)text + at, bytes - at);
        if (step == 0) return false;
        at += step;
    }
    return true;
}

bool cf_is_name(const char* name) {
    const size_t length = name == NULL ? 0 : strnlen(name, CF_NAME_BYTES + 1);
    if (length == 0 || length > CF_NAME_BYTES || name[0] == '.') return false;
    return strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.") == length;
}

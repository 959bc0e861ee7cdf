/* The command line. */
#include "options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "usage: cfengine_view NAME [options]\n"
    "  NAME                 of the ring, as in `cfengine serve --ring NAME`\n"
    "  --scale N            window pixels a frame pixel, 1 to 16 (default: what fits the display)\n"
    "  --frames N           quit after N new frames\n"
    "  --screenshot FILE    save the window's picture as a BMP file when it quits\n"
    "  --key-at FRAME:KEY   press and release a key (Left, Right, Space, R, Tab, Return, Escape) once FRAME new "
    "frames\n"
    "                       were shown; KEY+ only presses, KEY- only releases, =TEXT types\n"
    "keys: left and right turn, space pauses, r resets, Tab asks for a prompt (Return sends it), Escape quits\n";

static bool complain(const char* what, const char* value) {
    fprintf(stderr, "cfengine_view: %s%s%s\n%s", what, value != NULL ? ": " : "", value != NULL ? value : "", usage);
    return false;
}

static bool read_number(const char* text, uint64_t least, uint64_t most, uint64_t* out) {
    char* end = NULL;
    if (text == NULL || *text < '0' || *text > '9') return false;
    *out = strtoull(text, &end, 10);
    return *end == 0 && *out >= least && *out <= most;
}

/* FRAME:KEY */
static bool read_key(char* text, options* out) {
    char* colon = text != NULL ? strchr(text, ':') : NULL;
    if (colon == NULL || colon[1] == 0 || out->key_count == MOST_SCRIPTED_KEYS) return false;
    *colon = 0;
    scripted_key* key = &out->keys[out->key_count];
    key->key = colon + 1;
    if (!read_number(text, 0, UINT64_MAX, &key->frame)) return false;
    ++out->key_count;
    return true;
}

bool options_read(int argc, char** argv, options* out) {
    *out = (options){0};
    for (int i = 1; i < argc; ++i) {
        uint64_t number = 0;
        char *option = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (option[0] != '-') {
            if (out->name != NULL) return complain("more than one name", option);
            out->name = option;
            continue;
        }
        ++i;
        if (strcmp(option, "--scale") == 0) {
            if (!read_number(value, 1, 16, &number)) return complain("--scale needs a number from 1 to 16", value);
            out->scale = (int)number;
        } else if (strcmp(option, "--frames") == 0) {
            if (!read_number(value, 1, UINT64_MAX, &out->frames)) return complain("--frames needs a number", value);
        } else if (strcmp(option, "--screenshot") == 0) {
            if ((out->screenshot = value) == NULL) return complain("--screenshot needs a file", NULL);
        } else if (strcmp(option, "--key-at") == 0) {
            if (!read_key(value, out)) return complain("--key-at needs FRAME:KEY, 32 times at most", value);
        } else {
            return complain("unknown option", option);
        }
    }
    return out->name != NULL || complain("the name of a ring is missing", NULL);
}

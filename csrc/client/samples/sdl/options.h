/* The command line. */
#ifndef VIEW_OPTIONS_H
#define VIEW_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

enum { MOST_SCRIPTED_KEYS = 32 };

/* Press `key` once `frame` new frames were shown; a key that begins with '=' types the rest. */
typedef struct scripted_key {
    uint64_t frame;
    const char* key;
} scripted_key;

typedef struct options {
    const char* name;       /* of the ring */
    const char* screenshot; /* file; NULL: none */
    uint64_t frames;        /* quit after so many new frames; 0: never */
    int scale;              /* window pixels a frame pixel; 0: what fits the display */
    int key_count;
    scripted_key keys[MOST_SCRIPTED_KEYS]; /* in the order given */
} options;

/* False: what is wrong was said on stderr. */
bool options_read(int argc, char** argv, options* out);

#endif

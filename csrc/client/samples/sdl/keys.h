/* The keyboard: what is pressed becomes events of the stream. */
#ifndef VIEW_KEYS_H
#define VIEW_KEYS_H

#include <SDL.h>
#include <stdbool.h>

#include "cfengine_client.h"
#include "options.h"
#include "stream.h"

typedef struct keys {
    bool left, right; /* held */
    int turn;         /* what the writer was told last: -1, 0, 1 */
    uint64_t told_generation;
    bool typing;
    char prompt[CF_PROMPT_BYTES + 1];
    size_t prompt_bytes;
    int scripted; /* of options->keys that were pressed */
    bool quit;
} keys;

/* Press the scripted keys whose frame has come. */
void keys_script(keys* keys, const options* options, uint64_t frames_shown);

/* Take one event of SDL. */
void keys_take(keys* keys, const SDL_Event* event, stream* stream);

/* Tell the writer which way to turn, if that is not what it knows: again after a restart, and after a full queue. */
void keys_steer(keys* keys, stream* stream);

#endif

/* The keyboard: what is pressed becomes events of the stream. */
#include "keys.h"

#include <stdio.h>
#include <string.h>

#include "cfengine_actions.h"

/* Scripted keys --------------------------------------------------------------------------------------------------- */

static void type_text(const char* text) {
    SDL_Event event = {.text = {.type = SDL_TEXTINPUT}};
    for (size_t bytes; (bytes = SDL_utf8strlcpy(event.text.text, text, sizeof event.text.text)) > 0; text += bytes)
        SDL_PushEvent(&event); /* an event holds 31 bytes; the copy ends with a whole character */
}

static void press(const char* key) {
    char name[32];
    const size_t length = strlen(key);
    const char last = length > 1 ? key[length - 1] : 0;
    if (key[0] == '=') {
        type_text(key + 1);
        return;
    }
    SDL_strlcpy(name, key, sizeof name);
    if ((last == '+' || last == '-') && length < sizeof name) name[length - 1] = 0;
    SDL_Event event = {.key = {.type = SDL_KEYDOWN, .state = SDL_PRESSED}};
    event.key.keysym.sym = SDL_GetKeyFromName(name);
    if (event.key.keysym.sym == SDLK_UNKNOWN) {
        fprintf(stderr, "cfengine_view: no key is called %s\n", name);
        return;
    }
    if (last != '-') SDL_PushEvent(&event);
    event.key.type = SDL_KEYUP;
    event.key.state = SDL_RELEASED;
    if (last != '+') SDL_PushEvent(&event);
}

void keys_script(keys* keys, const options* options, uint64_t frames_shown) {
    while (keys->scripted < options->key_count && options->keys[keys->scripted].frame <= frames_shown)
        press(options->keys[keys->scripted++].key);
}

/* The prompt ------------------------------------------------------------------------------------------------------ */

static void begin_prompt(keys* keys) {
    keys->typing = true;
    keys->left = keys->right = false;
    keys->prompt_bytes = 0;
    keys->prompt[0] = 0;
    SDL_StartTextInput();
}

static void end_prompt(keys* keys) {
    keys->typing = false;
    SDL_StopTextInput();
}

static void send_prompt(keys* keys, stream* stream) {
    cf_event event = CF_EVENT_INIT;
    event.kind = CF_EVENT_PROMPT;
    event.as.prompt = (cf_prompt){keys->prompt, (uint32_t)keys->prompt_bytes};
    if (keys->prompt_bytes == 0 || stream_push(stream, &event)) end_prompt(keys);
}

static void add_text(keys* keys, const char* text) {
    const size_t bytes = strlen(text);
    if (keys->prompt_bytes + bytes > CF_PROMPT_BYTES) return;
    memcpy(keys->prompt + keys->prompt_bytes, text, bytes + 1);
    keys->prompt_bytes += bytes;
}

/* A character of UTF-8 ends where the next byte is not 10xxxxxx. */
static void remove_character(keys* keys) {
    while (keys->prompt_bytes > 0 && (keys->prompt[--keys->prompt_bytes] & 0xc0) == 0x80) continue;
    keys->prompt[keys->prompt_bytes] = 0;
}

static void take_typing(keys* keys, SDL_Keycode key, stream* stream) {
    switch (key) {
        case SDLK_RETURN:
        case SDLK_KP_ENTER:
            send_prompt(keys, stream);
            break;
        case SDLK_ESCAPE:
            end_prompt(keys);
            break;
        case SDLK_BACKSPACE:
            remove_character(keys);
            break;
        default:
            break;
    }
}

/* Steering -------------------------------------------------------------------------------------------------------- */

static void push_plain(stream* stream, uint32_t kind) {
    cf_event event = CF_EVENT_INIT;
    event.kind = kind;
    stream_push(stream, &event);
}

static void take_key(keys* keys, SDL_Keycode key, stream* stream) {
    const bool paused = stream->state.state == CF_STATE_PAUSED;
    switch (key) {
        case SDLK_LEFT:
            keys->left = true;
            break;
        case SDLK_RIGHT:
            keys->right = true;
            break;
        case SDLK_SPACE:
            push_plain(stream, paused ? CF_EVENT_RESUME : CF_EVENT_PAUSE);
            break;
        case SDLK_r:
            push_plain(stream, CF_EVENT_RESET);
            break;
        case SDLK_TAB:
            begin_prompt(keys);
            break;
        case SDLK_ESCAPE:
            keys->quit = true;
            break;
        default:
            break;
    }
}

void keys_take(keys* keys, const SDL_Event* event, stream* stream) {
    switch (event->type) {
        case SDL_QUIT:
            keys->quit = true;
            break;
        case SDL_TEXTINPUT:
            if (keys->typing) add_text(keys, event->text.text);
            break;
        case SDL_KEYDOWN:
            if (keys->typing)
                take_typing(keys, event->key.keysym.sym, stream);
            else if (event->key.repeat == 0)
                take_key(keys, event->key.keysym.sym, stream);
            break;
        case SDL_KEYUP:
            if (event->key.keysym.sym == SDLK_LEFT) keys->left = false;
            if (event->key.keysym.sym == SDLK_RIGHT) keys->right = false;
            break;
        default:
            break;
    }
    keys_steer(keys, stream); /* here too: a key that goes down and up between two pictures counts */
}

void keys_steer(keys* keys, stream* stream) {
    const int turn = keys->right - keys->left;
    if (keys->told_generation != stream->state.generation) { /* a writer that begins turns nowhere */
        keys->told_generation = stream->state.generation;
        keys->turn = 0;
    }
    if (turn == keys->turn) return;
    cf_event event = CF_EVENT_INIT;
    event.kind = CF_EVENT_ACTION;
    event.as.action = (cf_action){CF_ACTION_TURN, turn};
    if (stream_push(stream, &event)) keys->turn = turn;
}

/* The window: one texture, scaled into it with the frame's aspect, at the pace of the display. */
#ifndef VIEW_SCREEN_H
#define VIEW_SCREEN_H

#include <SDL.h>
#include <stdbool.h>
#include <stdint.h>

#include "cfengine_client.h"

typedef struct screen {
    SDL_Window* window;
    SDL_Renderer* renderer;
    SDL_Texture* texture; /* NULL: no frame yet */
    uint32_t format, width, height;
    uint64_t generation, id; /* of the frame in the texture; 0: none */
    uint64_t uploads;
    int scale;            /* wanted; 0: what fits */
    int64_t period_ns;    /* of the display */
    int64_t presented_ns; /* when the last picture was handed to it */
    bool paced;           /* presenting waits for the display by itself */
} screen;

/* False: SDL_GetError() says why. */
bool screen_open(screen* screen, const char* title, int scale);
void screen_close(screen* screen);

/* When the picture that is drawn now will be seen: at the vsync after the last one. */
int64_t screen_next_ns(const screen* screen);

/* Put the frame's pixels into the texture, unless they are there. False: SDL_GetError() says why. */
bool screen_upload(screen* screen, const cf_frame* frame);

/* The texture holds nothing worth showing, or the device has lost it: upload the next frame whatever it is. */
void screen_forget(screen* screen);

/* Draw. Nothing is seen before screen_present. */
void screen_draw(screen* screen);

/* Show what was drawn and wait for the display, or for as long as it would take. */
void screen_present(screen* screen);

/* Wait for as long as a picture takes, without one. */
void screen_wait(screen* screen);

/* Save what was drawn, before it is presented. False: SDL_GetError() says why. */
bool screen_save(const screen* screen, const char* file);

#endif

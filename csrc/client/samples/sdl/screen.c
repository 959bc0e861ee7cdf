/* The window: one texture, scaled into it with the frame's aspect, at the pace of the display. */
#include "screen.h"

static int64_t display_period_ns(SDL_Window* window) {
    SDL_DisplayMode mode;
    const int index = SDL_GetWindowDisplayIndex(window);
    const bool known = index >= 0 && SDL_GetCurrentDisplayMode(index, &mode) == 0 && mode.refresh_rate > 0;
    return 1000000000 / (known ? mode.refresh_rate : 60);
}

bool screen_open(screen* screen, const char* title, int scale) {
    *screen = (struct screen){.scale = scale};
    const uint32_t flags = SDL_WINDOW_RESIZABLE | SDL_WINDOW_ALLOW_HIGHDPI;
    screen->window = SDL_CreateWindow(title, SDL_WINDOWPOS_CENTERED, SDL_WINDOWPOS_CENTERED, 640, 360, flags);
    if (screen->window == NULL) return false;
    screen->renderer = SDL_CreateRenderer(screen->window, -1, SDL_RENDERER_PRESENTVSYNC);
    if (screen->renderer == NULL) return false;
    SDL_RendererInfo info;
    screen->paced = SDL_GetRendererInfo(screen->renderer, &info) == 0 && info.flags & SDL_RENDERER_PRESENTVSYNC;
    screen->period_ns = display_period_ns(screen->window);
    screen->presented_ns = cf_now_ns();
    SDL_SetYUVConversionMode(SDL_YUV_CONVERSION_BT709);
    return true;
}

void screen_close(screen* screen) {
    if (screen->texture != NULL) SDL_DestroyTexture(screen->texture);
    if (screen->renderer != NULL) SDL_DestroyRenderer(screen->renderer);
    if (screen->window != NULL) SDL_DestroyWindow(screen->window);
}

int64_t screen_next_ns(const screen* screen) {
    const int64_t now = cf_now_ns(), next = screen->presented_ns + screen->period_ns;
    return next > now ? next : now;
}

/* The window takes the frame's size, times a whole number. */
static void fit_window(const screen* screen) {
    int scale = screen->scale;
    if (scale == 0) {
        SDL_Rect room = {0, 0, 1280, 720};
        const int index = SDL_GetWindowDisplayIndex(screen->window);
        if (index >= 0) SDL_GetDisplayUsableBounds(index, &room);
        const int across = room.w * 3 / 4 / (int)screen->width, down = room.h * 3 / 4 / (int)screen->height;
        scale = across < down ? across : down;
        if (scale < 1) scale = 1;
    }
    SDL_SetWindowSize(screen->window, (int)screen->width * scale, (int)screen->height * scale);
}

void screen_forget(screen* screen) {
    if (screen->texture != NULL) SDL_DestroyTexture(screen->texture);
    screen->texture = NULL;
    screen->id = 0;
}

/* A texture for frames of this kind. */
static bool make_texture(screen* screen, const cf_frame* frame) {
    const uint32_t format = frame->format == CF_FORMAT_NV12 ? SDL_PIXELFORMAT_NV12 : SDL_PIXELFORMAT_RGBA32;
    const bool resized = frame->width != screen->width || frame->height != screen->height;
    screen_forget(screen);
    screen->texture =
        SDL_CreateTexture(screen->renderer, format, SDL_TEXTUREACCESS_STREAMING, (int)frame->width, (int)frame->height);
    if (screen->texture == NULL) return false;
    SDL_SetTextureBlendMode(screen->texture, SDL_BLENDMODE_NONE); /* frames are opaque */
    screen->format = frame->format;
    screen->width = frame->width;
    screen->height = frame->height;
    if (resized) fit_window(screen);
    return true;
}

/* By number, not by CF_FRAME_REPEATED: what a writer shows once more is new to a reader that never had it. */
bool screen_upload(screen* screen, const cf_frame* frame) {
    if (frame->id == screen->id && frame->generation == screen->generation) return true;
    const bool same = screen->texture != NULL && frame->format == screen->format && frame->width == screen->width &&
                      frame->height == screen->height;
    if (!same && !make_texture(screen, frame)) return false;
    const cf_plane *first = &frame->planes[0], *second = &frame->planes[1];
    const int result = frame->format == CF_FORMAT_NV12
                           ? SDL_UpdateNVTexture(screen->texture, NULL, first->data, (int)first->stride, second->data,
                                                 (int)second->stride)
                           : SDL_UpdateTexture(screen->texture, NULL, first->data, (int)first->stride);
    if (result != 0) return false;
    ++screen->uploads;
    screen->generation = frame->generation;
    screen->id = frame->id;
    return true;
}

/* The largest rectangle of the frame's aspect in the middle of the window. */
static SDL_Rect letterbox(const screen* screen, int across, int down) {
    const int64_t wide = (int64_t)across * screen->height, high = (int64_t)down * screen->width;
    SDL_Rect rect = {0, 0, across, down};
    if (wide > high)
        rect.w = (int)(high / screen->height);
    else
        rect.h = (int)(wide / screen->width);
    rect.x = (across - rect.w) / 2;
    rect.y = (down - rect.h) / 2;
    return rect;
}

void screen_draw(screen* screen) {
    int across = 0, down = 0;
    SDL_SetRenderDrawColor(screen->renderer, 0, 0, 0, 255);
    SDL_RenderClear(screen->renderer);
    if (screen->id == 0 || SDL_GetRendererOutputSize(screen->renderer, &across, &down) != 0) return;
    const SDL_Rect rect = letterbox(screen, across, down);
    const bool whole = rect.w % (int)screen->width == 0 && rect.h % (int)screen->height == 0;
    SDL_SetTextureScaleMode(screen->texture, whole ? SDL_ScaleModeNearest : SDL_ScaleModeLinear);
    SDL_RenderCopy(screen->renderer, screen->texture, NULL, &rect);
}

void screen_wait(screen* screen) {
    const int64_t until = screen->presented_ns + screen->period_ns, now = cf_now_ns();
    if (until > now) SDL_Delay((uint32_t)((until - now + 999999) / 1000000));
    screen->presented_ns = cf_now_ns();
}

void screen_present(screen* screen) {
    SDL_RenderPresent(screen->renderer);
    /* a window that is hidden, or a driver without vsync, presents at once */
    const int64_t now = cf_now_ns();
    if (!screen->paced || now - screen->presented_ns < screen->period_ns / 2)
        screen_wait(screen);
    else
        screen->presented_ns = now;
}

bool screen_save(const screen* screen, const char* file) {
    int across = 0, down = 0;
    if (SDL_GetRendererOutputSize(screen->renderer, &across, &down) != 0) return false;
    SDL_Surface* surface = SDL_CreateRGBSurfaceWithFormat(0, across, down, 24, SDL_PIXELFORMAT_BGR24);
    if (surface == NULL) return false;
    const bool saved =
        SDL_RenderReadPixels(screen->renderer, NULL, SDL_PIXELFORMAT_BGR24, surface->pixels, surface->pitch) == 0 &&
        SDL_SaveBMP(surface, file) == 0;
    SDL_FreeSurface(surface);
    return saved;
}

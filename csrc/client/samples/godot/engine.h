/* What the extension uses of Godot: functions by name, and values as Variants, so that nothing here depends on hashes
 * of methods or on C++.
 *
 * A gd_variant that a function returns belongs to the caller, who ends it with gd_end.
 */
#ifndef ENGINE_H
#define ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "gdextension_interface.h"

typedef struct gd_variant {
    uint64_t words[5]; /* 24 bytes in Godot's own builds, 40 in those of double precision */
} gd_variant;

typedef struct gd_name {
    void* interned; /* StringName: equal names are one pointer */
} gd_name;

typedef struct gd_string {
    void* data; /* String; NULL is the empty one */
} gd_string;

/* Find every function. False: this Godot is older than 4.3. */
bool gd_load(GDExtensionInterfaceGetProcAddress find, GDExtensionClassLibraryPtr library);

gd_name gd_name_of(const char* text); /* lives as long as the program */

gd_variant gd_nil(void);
gd_variant gd_empty(GDExtensionVariantType type);
gd_variant gd_int(int64_t value);
gd_variant gd_float(double value);
gd_variant gd_text(const char* utf8);
gd_variant gd_object(GDExtensionObjectPtr object); /* holds a reference to what is counted */
void gd_end(gd_variant* value);

int64_t gd_to_int(const gd_variant* value);
double gd_to_float(const gd_variant* value);
/* As UTF-8 of at most `size` bytes, without a zero behind; the number of bytes that there are. */
int64_t gd_to_text(const gd_variant* value, char* utf8, int64_t size);
GDExtensionObjectPtr gd_to_object(const gd_variant* value);

/* A value of `type` where Godot wants it bare, and back. */
gd_variant gd_wrap(GDExtensionVariantType type, GDExtensionConstTypePtr bare);
void gd_unwrap(GDExtensionVariantType type, const gd_variant* value, GDExtensionTypePtr bare);

/* self.method(arguments...); a nil, and a warning, where that cannot be called so. */
gd_variant gd_call(gd_variant* self, gd_name method, const gd_variant* const* arguments, int count);

/* A new object of one of Godot's classes. */
GDExtensionObjectPtr gd_make(const char* class_name);
uint8_t* gd_image_bytes(GDExtensionObjectPtr image);
void gd_warn(const char* text);

/* Classes ---------------------------------------------------------------------------------------------------------- */

typedef void (*gd_method_body)(void* instance, const gd_variant* const* arguments, gd_variant* result);

typedef struct gd_method {
    const char* name;
    gd_method_body body; /* makes *result, a nil before */
    GDExtensionVariantType returns;
    int count; /* of arguments */
    GDExtensionVariantType types[2];
    const char* names[2];
} gd_method;

typedef struct gd_class {
    const char *name, *parent;
    void* (*make)(void);
    void (*end)(void* instance);
    void (*process)(void* instance, double delta); /* Node._process */
    const gd_method* methods;
    int method_count;
} gd_class;

/* `class` lives as long as the library. One class a library. */
void gd_register(const gd_class* class);
void gd_property(const char* name, GDExtensionVariantType type, const char* setter, const char* getter);
void gd_unregister(void);

#endif

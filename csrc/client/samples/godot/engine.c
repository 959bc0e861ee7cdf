/* Godot's functions by name, values as Variants, one class. */
#include "engine.h"

#include <stdlib.h>
#include <string.h>

#define USAGE_DEFAULT 6u /* PROPERTY_USAGE_STORAGE | PROPERTY_USAGE_EDITOR */

/* Written once, by gd_load. */
static struct {
    GDExtensionClassLibraryPtr library;
    GDExtensionInterfaceStringNameNewWithLatin1Chars name_new;
    GDExtensionInterfaceStringNewWithUtf8Chars string_new;
    GDExtensionInterfaceStringToUtf8Chars string_to_utf8;
    GDExtensionInterfaceVariantNewNil variant_new_nil;
    GDExtensionInterfaceVariantConstruct variant_construct;
    GDExtensionInterfaceVariantDestroy variant_destroy;
    GDExtensionInterfaceVariantCall variant_call;
    GDExtensionInterfaceGetVariantFromTypeConstructor from_type;
    GDExtensionInterfaceGetVariantToTypeConstructor to_type;
    GDExtensionInterfaceVariantGetPtrDestructor destructor;
    GDExtensionInterfaceClassdbConstructObject construct;
    GDExtensionInterfaceObjectSetInstance set_instance;
    GDExtensionInterfaceObjectSetInstanceBinding set_binding;
    GDExtensionInterfaceRefSetObject ref_set;
    GDExtensionInterfaceImagePtrw image_ptrw;
    GDExtensionInterfacePrintWarningWithMessage warn;
    GDExtensionInterfaceClassdbRegisterExtensionClass3 register_class;
    GDExtensionInterfaceClassdbRegisterExtensionClassMethod register_method;
    GDExtensionInterfaceClassdbRegisterExtensionClassProperty register_property;
    GDExtensionInterfaceClassdbUnregisterExtensionClass unregister;
} godot;

static const gd_class* the_class;
static gd_name class_name, process_name, no_name;
static gd_string no_string;

bool gd_load(GDExtensionInterfaceGetProcAddress find, GDExtensionClassLibraryPtr library) {
    const struct {
        const char* name;
        void* place;
    } wanted[] = {
        {"string_name_new_with_latin1_chars", &godot.name_new},
        {"string_new_with_utf8_chars", &godot.string_new},
        {"string_to_utf8_chars", &godot.string_to_utf8},
        {"variant_new_nil", &godot.variant_new_nil},
        {"variant_construct", &godot.variant_construct},
        {"variant_destroy", &godot.variant_destroy},
        {"variant_call", &godot.variant_call},
        {"get_variant_from_type_constructor", &godot.from_type},
        {"get_variant_to_type_constructor", &godot.to_type},
        {"variant_get_ptr_destructor", &godot.destructor},
        {"classdb_construct_object", &godot.construct},
        {"object_set_instance", &godot.set_instance},
        {"object_set_instance_binding", &godot.set_binding},
        {"ref_set_object", &godot.ref_set},
        {"image_ptrw", &godot.image_ptrw},
        {"print_warning_with_message", &godot.warn},
        {"classdb_register_extension_class3", &godot.register_class},
        {"classdb_register_extension_class_method", &godot.register_method},
        {"classdb_register_extension_class_property", &godot.register_property},
        {"classdb_unregister_extension_class", &godot.unregister},
    };
    godot.library = library;
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; ++i) {
        const GDExtensionInterfaceFunctionPtr found = find(wanted[i].name);
        if (found == NULL) return false;
        memcpy(wanted[i].place, &found, sizeof found);
    }
    no_name = gd_name_of("");
    process_name = gd_name_of("_process");
    return true;
}

/* Values ----------------------------------------------------------------------------------------------------------- */

gd_name gd_name_of(const char* text) {
    gd_name name = {NULL};
    godot.name_new(&name, text, true);
    return name;
}

gd_variant gd_nil(void) {
    gd_variant value;
    godot.variant_new_nil(&value);
    return value;
}

gd_variant gd_wrap(GDExtensionVariantType type, GDExtensionConstTypePtr bare) {
    gd_variant value;
    godot.from_type(type)(&value, (GDExtensionTypePtr)bare);
    return value;
}

void gd_unwrap(GDExtensionVariantType type, const gd_variant* value, GDExtensionTypePtr bare) {
    godot.to_type(type)(bare, (GDExtensionVariantPtr)value);
}

gd_variant gd_empty(GDExtensionVariantType type) {
    GDExtensionCallError error;
    gd_variant value;
    godot.variant_construct(type, &value, NULL, 0, &error);
    return value;
}

gd_variant gd_int(int64_t value) { return gd_wrap(GDEXTENSION_VARIANT_TYPE_INT, &value); }

gd_variant gd_float(double value) { return gd_wrap(GDEXTENSION_VARIANT_TYPE_FLOAT, &value); }

static void end_string(gd_string* string) { godot.destructor(GDEXTENSION_VARIANT_TYPE_STRING)(string); }

gd_variant gd_text(const char* utf8) {
    gd_string string = {NULL};
    godot.string_new(&string, utf8);
    const gd_variant value = gd_wrap(GDEXTENSION_VARIANT_TYPE_STRING, &string);
    end_string(&string);
    return value;
}

gd_variant gd_object(GDExtensionObjectPtr object) { return gd_wrap(GDEXTENSION_VARIANT_TYPE_OBJECT, &object); }

void gd_end(gd_variant* value) { godot.variant_destroy(value); }

int64_t gd_to_int(const gd_variant* value) {
    int64_t number = 0;
    gd_unwrap(GDEXTENSION_VARIANT_TYPE_INT, value, &number);
    return number;
}

double gd_to_float(const gd_variant* value) {
    double number = 0;
    gd_unwrap(GDEXTENSION_VARIANT_TYPE_FLOAT, value, &number);
    return number;
}

int64_t gd_to_text(const gd_variant* value, char* utf8, int64_t size) {
    gd_string string = {NULL};
    gd_unwrap(GDEXTENSION_VARIANT_TYPE_STRING, value, &string);
    const int64_t bytes = godot.string_to_utf8(&string, NULL, 0);
    godot.string_to_utf8(&string, utf8, size);
    end_string(&string);
    return bytes;
}

GDExtensionObjectPtr gd_to_object(const gd_variant* value) {
    GDExtensionObjectPtr object = NULL;
    gd_unwrap(GDEXTENSION_VARIANT_TYPE_OBJECT, value, &object);
    return object;
}

gd_variant gd_call(gd_variant* self, gd_name method, const gd_variant* const* arguments, int count) {
    GDExtensionCallError error = {GDEXTENSION_CALL_OK, 0, 0};
    gd_variant result;
    godot.variant_call(self, &method, (const GDExtensionConstVariantPtr*)arguments, count, &result, &error);
    if (error.error != GDEXTENSION_CALL_OK) gd_warn("one of Godot's methods is not as it was in 4.3");
    return result;
}

GDExtensionObjectPtr gd_make(const char* name) {
    const gd_name of = gd_name_of(name);
    return godot.construct(&of);
}

uint8_t* gd_image_bytes(GDExtensionObjectPtr image) { return godot.image_ptrw(image); }

void gd_warn(const char* text) { godot.warn("cfengine", text, the_class != NULL ? the_class->name : "", "", 0, true); }

/* The class -------------------------------------------------------------------------------------------------------- */

static GDExtensionObjectPtr create(void* userdata) {
    static const GDExtensionInstanceBindingCallbacks callbacks = {NULL, NULL, NULL};
    (void)userdata;
    void* instance = the_class->make();
    const GDExtensionObjectPtr object = gd_make(the_class->parent);
    godot.set_instance(object, &class_name, instance);
    godot.set_binding(object, godot.library, instance, &callbacks);
    return object;
}

static void end(void* userdata, GDExtensionClassInstancePtr instance) {
    (void)userdata;
    the_class->end(instance);
}

static void process(GDExtensionClassInstancePtr instance, const GDExtensionConstTypePtr* arguments,
                    GDExtensionTypePtr result) {
    (void)result;
    the_class->process(instance, *(const double*)arguments[0]);
}

static GDExtensionClassCallVirtual find_virtual(void* userdata, GDExtensionConstStringNamePtr name) {
    (void)userdata;
    return ((const gd_name*)name)->interned == process_name.interned ? process : NULL;
}

/* A method is called with Variants by scripts that know no types, and with bare values by those that do. */
static void call(void* userdata, GDExtensionClassInstancePtr instance, const GDExtensionConstVariantPtr* arguments,
                 GDExtensionInt count, GDExtensionVariantPtr result, GDExtensionCallError* error) {
    const gd_method* method = userdata;
    const bool fits = count == method->count;
    error->error = fits                    ? GDEXTENSION_CALL_OK
                   : count < method->count ? GDEXTENSION_CALL_ERROR_TOO_FEW_ARGUMENTS
                                           : GDEXTENSION_CALL_ERROR_TOO_MANY_ARGUMENTS;
    error->expected = method->count;
    if (fits) method->body(instance, (const gd_variant* const*)arguments, result);
}

static void call_bare(void* userdata, GDExtensionClassInstancePtr instance, const GDExtensionConstTypePtr* arguments,
                      GDExtensionTypePtr bare) {
    const gd_method* method = userdata;
    gd_variant values[2], result = gd_nil();
    const gd_variant* pointers[] = {&values[0], &values[1]};
    for (int i = 0; i < method->count; ++i) values[i] = gd_wrap(method->types[i], arguments[i]);
    method->body(instance, pointers, &result);
    for (int i = 0; i < method->count; ++i) gd_end(&values[i]);
    if (method->returns == GDEXTENSION_VARIANT_TYPE_OBJECT)
        godot.ref_set(bare, gd_to_object(&result)); /* a counted object comes back as a Ref */
    else if (method->returns != GDEXTENSION_VARIANT_TYPE_NIL)
        gd_unwrap(method->returns, &result, bare);
    gd_end(&result);
}

static GDExtensionPropertyInfo describe(GDExtensionVariantType type, gd_name* name) {
    return (GDExtensionPropertyInfo){type, name, &no_name, 0, &no_string, USAGE_DEFAULT};
}

static void register_method(const gd_method* method) {
    gd_name name = gd_name_of(method->name), names[2] = {no_name, no_name};
    GDExtensionPropertyInfo result = describe(method->returns, &no_name), arguments[2];
    GDExtensionClassMethodArgumentMetadata plain[2] = {GDEXTENSION_METHOD_ARGUMENT_METADATA_NONE,
                                                       GDEXTENSION_METHOD_ARGUMENT_METADATA_NONE};
    for (int i = 0; i < method->count; ++i) {
        names[i] = gd_name_of(method->names[i]);
        arguments[i] = describe(method->types[i], &names[i]);
    }
    const GDExtensionClassMethodInfo info = {
        .name = &name,
        .method_userdata = (void*)method,
        .call_func = call,
        .ptrcall_func = call_bare,
        .method_flags = GDEXTENSION_METHOD_FLAGS_DEFAULT,
        .has_return_value = method->returns != GDEXTENSION_VARIANT_TYPE_NIL,
        .return_value_info = &result,
        .argument_count = (uint32_t)method->count,
        .arguments_info = arguments,
        .arguments_metadata = plain,
    };
    godot.register_method(godot.library, &class_name, &info);
}

void gd_register(const gd_class* class) {
    const gd_name parent = gd_name_of(class->parent);
    const GDExtensionClassCreationInfo3 info = {
        .is_exposed = true,
        .is_runtime = true, /* in the editor a placeholder stands for it, which reads no ring */
        .create_instance_func = create,
        .free_instance_func = end,
        .get_virtual_func = find_virtual,
    };
    the_class = class;
    class_name = gd_name_of(class->name);
    godot.register_class(godot.library, &class_name, &parent, &info);
    for (int i = 0; i < class->method_count; ++i) register_method(&class->methods[i]);
}

void gd_property(const char* name, GDExtensionVariantType type, const char* setter, const char* getter) {
    gd_name names[] = {gd_name_of(name), gd_name_of(setter), gd_name_of(getter)};
    const GDExtensionPropertyInfo info = describe(type, &names[0]);
    godot.register_property(godot.library, &class_name, &info, &names[1], &names[2]);
}

void gd_unregister(void) { godot.unregister(godot.library, &class_name); }

/* Taking the name of a ring from a writer that is dead. */
#ifndef CF_EVICT_H
#define CF_EVICT_H

#include "cfengine_client.h"

/* Remove what has the name, if no living process writes it. SUCCESS too where it went by itself. BUSY. */
cf_result cf_evict(const char* name);

#endif

/* SPDX-License-Identifier: MIT */
/*
 * lz4.c - the system's liblz4, if it has one.
 *
 * Opened at run time, so that emu neither ships a compressor nor needs one: without it pages are stored as they are.
 * RTLD_NOW: a symbol that is resolved at its first call would be resolved inside the SIGBUS handler, where the
 * dynamic linker's lock may be held by the very thread that faulted.
 */
#define _GNU_SOURCE
#include "core.h"
#include "store.h"

#include <dlfcn.h>

static struct emu_lz4 lz4;

static void open_once(void)
{
	void *lib = dlopen("liblz4.so.1", RTLD_NOW | RTLD_LOCAL);
	int (*state_size)(void);

	if (!lib)
		return;
	*(void **)&state_size = dlsym(lib, "LZ4_sizeofState");
	*(void **)&lz4.compress = dlsym(lib, "LZ4_compress_fast_extState");
	*(void **)&lz4.decompress = dlsym(lib, "LZ4_decompress_safe");
	if (!state_size || !lz4.compress || !lz4.decompress)
		lz4 = (struct emu_lz4){ 0 };
	else
		lz4.state_size = (size_t)state_size();
}

const struct emu_lz4 *emu_lz4(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, open_once);
	return lz4.state_size ? &lz4 : NULL;
}

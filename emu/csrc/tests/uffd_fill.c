/* SPDX-License-Identifier: MIT */
/* The retry function against a kernel of our own: each of its errors, in the order in which the real one gives them. */
#include "harness.h"

struct answer {
	int64_t bytes; /* the result field */
	int err;
};

static const struct answer *script;
static struct uffdio_copy asked[16];
static int calls;

static int scripted(int fd, unsigned long request, void *arg)
{
	struct uffdio_copy *copy = arg;
	const struct answer *a = &script[calls];

	CHECK_EQ(fd, 42);
	CHECK_EQ(request, UFFDIO_COPY);
	asked[calls++] = *copy;
	copy->copy = a->bytes;
	errno = a->err;
	return a->err ? -1 : 0;
}

static int fill(const struct answer *answers, uint64_t len, uint64_t *done, unsigned *eagain)
{
	int (*real)(int, unsigned long, void *) = emu_uffd_ioctl;
	int err;

	script = answers;
	calls = 0;
	*eagain = 0;
	emu_uffd_ioctl = scripted;
	err = emu_uffd_fill(42, EMU_FILL_COPY, 0x10000, (void *)0x900000, len, false, done, eagain);
	emu_uffd_ioctl = real;
	return err;
}

static int every_error_has_its_meaning(void)
{
	uint64_t done;
	unsigned eagain;

	/* all at once */
	CHECK_EQ(fill((struct answer[]){ { 0x8000, 0 } }, 0x8000, &done, &eagain), 0);
	CHECK_EQ(done, 0x8000);
	CHECK_EQ(asked[0].mode, UFFDIO_COPY_MODE_DONTWAKE);

	/* a part, then the page in the way */
	CHECK_EQ(fill((struct answer[]){ { 0x2000, EAGAIN }, { -EEXIST, EEXIST } }, 0x8000, &done, &eagain), -EEXIST);
	CHECK_EQ(done, 0x2000);
	CHECK_EQ(calls, 2);
	CHECK_EQ(asked[1].dst, 0x12000);
	CHECK_EQ(asked[1].src, 0x902000);
	CHECK_EQ(asked[1].len, 0x6000);
	CHECK_EQ(eagain, 0); /* progress isn't a pause */

	/* mappings changing: -EAGAIN in the result, which must not be added to done */
	CHECK_EQ(fill((struct answer[]){ { -EAGAIN, EAGAIN }, { -EAGAIN, EAGAIN }, { 0x1000, 0 } }, 0x1000, &done, &eagain), 0);
	CHECK_EQ(done, 0x1000);
	CHECK_EQ(eagain, 2);

	/* final ones */
	for (size_t i = 0; i < 4; i++) {
		static const int final[] = { ENOENT, ESRCH, ENOMEM, EFAULT };

		CHECK_EQ(fill((struct answer[]){ { 0x1000, EAGAIN }, { -final[i], final[i] } }, 0x2000, &done, &eagain), -final[i]);
		CHECK_EQ(done, 0x1000);
	}
	/* an error without a count */
	CHECK_EQ(fill((struct answer[]){ { 0, EINVAL } }, 0x1000, &done, &eagain), -EINVAL);
	CHECK_EQ(done, 0);
	return 0;
}

const struct test uffd_fill_tests[] = {
	{ "uffd: every error of a fill has its meaning", every_error_has_its_meaning },
	{ NULL, NULL },
};

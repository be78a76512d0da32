/* The objects of s3server: bytes in reused pieces, a sorted index of keys, uploads under way. */
#ifndef BENCH_S3STORE_H
#define BENCH_S3STORE_H

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { PIECE = 1 << 20, SMALL = 1 << 16, PARTS = 10001, KEY = 2048 };

struct blob { /* bytes, shared by reference */
    int refs;
    size_t size, count;
    char **pieces; /* `count` of them; all PIECE long but the last, or one malloc of `size` where size <= SMALL */
};

struct object { /* what a key names; immutable once it can be found */
    int refs;
    size_t size, count;
    struct blob **blobs; /* one, or one per part */
    char etag[64], type[128], *metadata; /* metadata: header lines */
    time_t modified;
};

struct upload {
    char id[40], key[KEY], type[128], *metadata;
    struct blob *parts[PARTS];
    struct upload *next;
};

struct entry {
    char *key;
    struct object *object;
};

static pthread_rwlock_t lock = PTHREAD_RWLOCK_INITIALIZER; /* guards entries and uploads */
static struct entry *entries;
static size_t entry_count, entry_room;
static struct upload *uploads;
static unsigned long serial;

static pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;
static void *pool; /* free pieces, linked through their first word */

static char *take_piece(void) {
    pthread_mutex_lock(&pool_lock);
    if (!pool) { /* 64 at a time, on huge pages where the kernel has them */
        char *slab = mmap(NULL, (size_t)PIECE * 64, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (slab == MAP_FAILED) { perror("mmap"); exit(1); }
        madvise(slab, (size_t)PIECE * 64, MADV_HUGEPAGE);
        for (int i = 0; i < 64; i++) {
            *(void **)(slab + (size_t)i * PIECE) = pool;
            pool = slab + (size_t)i * PIECE;
        }
    }
    char *piece = pool;
    pool = *(void **)piece;
    pthread_mutex_unlock(&pool_lock);
    return piece;
}

static void give_piece(char *piece) {
    pthread_mutex_lock(&pool_lock);
    *(void **)piece = pool;
    pool = piece;
    pthread_mutex_unlock(&pool_lock);
}

static struct blob *blob_new(size_t size) {
    struct blob *b = calloc(1, sizeof *b);
    b->refs = 1;
    b->size = size;
    b->count = size <= SMALL ? 1 : (size + PIECE - 1) / PIECE;
    b->pieces = malloc(b->count * sizeof *b->pieces);
    for (size_t i = 0; i < b->count; i++) b->pieces[i] = size <= SMALL ? malloc(size + 1) : take_piece();
    return b;
}

static void blob_drop(struct blob *b) {
    if (!b || __atomic_sub_fetch(&b->refs, 1, __ATOMIC_ACQ_REL)) return;
    for (size_t i = 0; i < b->count; i++) {
        if (b->size <= SMALL) free(b->pieces[i]);
        else give_piece(b->pieces[i]);
    }
    free(b->pieces);
    free(b);
}

static void object_drop(struct object *o) {
    if (!o || __atomic_sub_fetch(&o->refs, 1, __ATOMIC_ACQ_REL)) return;
    for (size_t i = 0; i < o->count; i++) blob_drop(o->blobs[i]);
    free(o->blobs);
    free(o->metadata);
    free(o);
}

/* Where `key` is, or where it would be; `found` tells which. */
static size_t position(const char *key, int *found) {
    size_t low = 0, high = entry_count;
    *found = 0;
    while (low < high) {
        size_t middle = (low + high) / 2;
        int order = strcmp(entries[middle].key, key);
        if (order < 0) low = middle + 1;
        else high = middle, *found |= !order;
    }
    return low;
}

static struct object *find(const char *key) {
    int found;
    pthread_rwlock_rdlock(&lock);
    size_t at = position(key, &found);
    struct object *o = found ? entries[at].object : NULL;
    if (o) __atomic_add_fetch(&o->refs, 1, __ATOMIC_RELAXED);
    pthread_rwlock_unlock(&lock);
    return o;
}

/* Put (or, with no object, delete) under the two conditions; returns an HTTP status. */
static int store(const char *key, struct object *o, const char *if_match, int if_none) {
    int found;
    pthread_rwlock_wrlock(&lock);
    size_t at = position(key, &found);
    int status = 200;
    if (found && if_none) status = 412;
    else if (*if_match && !found) status = 404;
    else if (*if_match && strcmp(entries[at].object->etag, if_match)) status = 412;
    else if (found && o) {
        object_drop(entries[at].object);
        entries[at].object = o;
    } else if (found) {
        object_drop(entries[at].object);
        free(entries[at].key);
        memmove(entries + at, entries + at + 1, (--entry_count - at) * sizeof *entries);
    } else if (o) {
        if (entry_count == entry_room) entries = realloc(entries, (entry_room = entry_room * 2 + 1024) * sizeof *entries);
        memmove(entries + at + 1, entries + at, (entry_count++ - at) * sizeof *entries);
        entries[at] = (struct entry){strdup(key), o};
    }
    pthread_rwlock_unlock(&lock);
    return status;
}

static struct object *object_new(struct blob **blobs, size_t count, const char *type, char *metadata, int parts) {
    struct object *o = calloc(1, sizeof *o);
    o->refs = 1;
    o->blobs = blobs;
    o->count = count;
    for (size_t i = 0; i < count; i++) o->size += blobs[i]->size;
    unsigned long n = __atomic_add_fetch(&serial, 1, __ATOMIC_RELAXED);
    if (parts) snprintf(o->etag, sizeof o->etag, "%016lx%016lx-%d", n * 0x9e3779b97f4a7c15UL, n, parts);
    else snprintf(o->etag, sizeof o->etag, "%016lx%016lx", n * 0x9e3779b97f4a7c15UL, n);
    snprintf(o->type, sizeof o->type, "%s", *type ? type : "binary/octet-stream");
    o->metadata = metadata;
    o->modified = time(NULL);
    return o;
}

static struct upload *find_upload(const char *id) { /* with the lock held */
    struct upload *u = uploads;
    while (u && strcmp(u->id, id)) u = u->next;
    return u;
}

static struct upload *take_upload(const char *id) {
    pthread_rwlock_wrlock(&lock);
    struct upload *u = find_upload(id), **link = &uploads;
    if (u) {
        while (*link != u) link = &(*link)->next;
        *link = u->next;
    }
    pthread_rwlock_unlock(&lock);
    return u;
}

static void upload_free(struct upload *u) {
    for (int i = 0; i < PARTS; i++) blob_drop(u->parts[i]);
    free(u->metadata);
    free(u);
}

static void reserve(size_t count) {
    char **pieces = malloc(count * sizeof *pieces);
    for (size_t i = 0; i < count; i++) memset(pieces[i] = take_piece(), 1, PIECE);
    for (size_t i = 0; i < count; i++) give_piece(pieces[i]);
    free(pieces);
}

#endif
